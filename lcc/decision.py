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

    Raises: RecipeError: a budget without images, or `resume` with a plan that was made for something else;
    ArtifactError: a file that is no plan where it is kept; what `plan_within` raises.
    """
    if isinstance(decision, tuple):
        return decision
    if calibration is None:
        raise RecipeError("a budget needs images to calibrate on: only they show what harms least")
    path, made_for = plan_of(directory), _hash_of(original, decision, calibration, settings)
    before = _kept(path)
    if before is None and path.exists():
        raise ArtifactError(
            f"{path} is no plan of this lcc and would be overwritten; move it, or choose another -o"
        )
    if not resume or before is None:
        planned = plan_within(original, decision, calibration, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _Kept(made_for=made_for, rules=planned.rules, report=planned.report)
        with written_at_once(path) as file:
            file.write_text(kept.model_dump_json(), encoding="utf-8")
        save(planned, save_plan, settings)
    elif before.made_for != made_for:
        raise RecipeError(
            f"can't resume: {path} is a plan for other weights, images or options; give what the run was "
            "begun with, or leave out --resume"
        )
    else:
        planned = Planned(before.rules, before.report)
        settings.say(f"going on with the plan in {path}")
        if save_plan is not None and save_plan.exists():
            settings.say(f"left {save_plan} as it is")
        else:
            save(planned, save_plan, settings)
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
    if directory is not None and path.resolve() == plan_of(directory).resolve():
        raise ArtifactError(
            f"{path} is where lcc keeps the plan for {directory} meanwhile; name another file"
        )


def discard(directory: Path) -> None:
    """Remove the plan that was kept, now that it is carried out; what lcc did not write there stays."""
    path = plan_of(directory)
    if _kept(path) is not None:
        path.unlink()


def _kept(path: Path) -> _Kept | None:
    """Return what is kept; None: there is nothing, or nothing of lcc's."""
    try:
        return _Kept.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _hash_of(original: Network, budget: Budget, calibration: Calibrate, settings: Settings) -> str:
    """Return a hash of what a plan is made for; where the images lie may change."""
    wanted, seen = (part.model_dump_json(exclude={"data"}) for part in (budget, calibration))
    weights, form = hash_of_weights(original.loaded.model), original.loaded.preprocessing.model_dump_json()
    timed = any(text.startswith("latency") for text in (*budget.targets, budget.minimise))
    return short_hash(f"{weights} {form} {wanted} {seen} {settings.bench_device if timed else ''}".encode())
