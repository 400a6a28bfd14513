"""What becomes of every site: rules as given, or a planner's, which are kept until they are carried out.

A run that is resumed goes on with the plan it was begun with, even where times would be measured, or errors
found out, anew: another plan would make its checkpoints worthless.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from lcc.directory import plan_of
from lcc.errors import ArtifactError, RecipeError
from lcc.hashing import hash_of_weights, short_hash
from lcc.plan import Rule
from lcc.plan_report import PlanReport, plan_line, rules_text
from lcc.planning import Planned, plan_within
from lcc.specs import Frozen
from lcc.written_files import check_file, written_at_once

if TYPE_CHECKING:
    from pathlib import Path

    from lcc.network import Network
    from lcc.recipe import Budget, Calibrate
    from lcc.settings import Settings


class _Kept(Frozen):
    """A plan, and a hash of what it was made for."""

    made_for: str
    rules: tuple[Rule, ...]
    report: PlanReport


def decided(
    original: Network,
    decision: tuple[Rule, ...] | Budget,
    calibration: Calibrate | None,
    directory: Path,
    settings: Settings,
    *,
    resume: bool = False,
    save_plan: Path | None = None,
) -> tuple[Rule, ...]:
    """Return the rules as given, or those that a planner makes for an lcc directory, or made before.

    Raises: RecipeError: a budget without images; what `plan_within` raises.
    """
    if isinstance(decision, tuple):
        return decision
    if calibration is None:
        raise RecipeError("a budget needs images to calibrate on: only they show what harms least")
    path, made_for = plan_of(directory), _hash_of(original, decision, calibration)
    planned = _kept(path, made_for) if resume else None
    if planned is None:
        planned = plan_within(original, decision, calibration, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _Kept(made_for=made_for, rules=planned.rules, report=planned.report)
        with written_at_once(path) as file:
            file.write_text(kept.model_dump_json(), encoding="utf-8")
        save(planned, save_plan, settings)
    else:
        settings.say(f"going on with the plan in {path}")
        save(planned, None if save_plan is None or save_plan.exists() else save_plan, settings)
    settings.say(plan_line(planned.report))
    return planned.rules


def save(planned: Planned, path: Path | None, settings: Settings) -> None:
    """Write a planner's rules as a file to edit, where one is asked for. Raises: ArtifactError."""
    if path is None:
        return
    with written_at_once(path) as file:
        file.write_text(rules_text(planned.rules, planned.report), encoding="utf-8")
    settings.say(f"wrote {path}; edit it, then: lcc convert SOURCE --plan {path} --calibrate DATA -o DIR")


def check(path: Path | None, *, force: bool, directory: Path | None = None) -> None:
    """Make sure, before any long work, that rules can be written there. Raises: ArtifactError."""
    if path is None:
        return
    check_file(path, force=force)
    if not path.parent.is_dir():
        raise ArtifactError(f"{path} can't be written: name a file in a folder that is there")
    if directory is not None and directory.resolve() in (path.resolve(), *path.resolve().parents):
        raise ArtifactError(f"{path} would be lost in {directory}, which is lcc's own; put it beside")


def discard(directory: Path) -> None:
    """Remove the plan that was kept, now that it is carried out."""
    plan_of(directory).unlink(missing_ok=True)


def _kept(path: Path, made_for: str) -> Planned | None:
    """Return the plan that is kept; None: there is none, or it was made for something else."""
    try:
        kept = _Kept.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return Planned(kept.rules, kept.report) if kept.made_for == made_for else None


def _hash_of(original: Network, budget: Budget, calibration: Calibrate) -> str:
    """Return a hash of what a plan is made for; where the images lie may change."""
    seen = calibration.model_dump_json(exclude={"data"})
    return short_hash(f"{hash_of_weights(original.loaded.model)} {budget.model_dump_json()} {seen}".encode())
