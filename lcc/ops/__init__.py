"""Numerics that more than one method needs: functions and accumulators on tensors, no nn.Module."""
