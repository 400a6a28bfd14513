"""The command that decides what becomes of a network, by hand or within a budget, and does it: `lcc convert`.

Annotations are not postponed here, since typer reads them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from lcc.errors import RecipeError
from lcc.options import NAMES, AsJson, Resume, checked, running, source_part, taking, writing
from lcc.output import form_of, print_inspection, print_plan, print_report

if TYPE_CHECKING:
    from lcc.plan import Rule
    from lcc.recipe import Budget, ModelPart
    from lcc.settings import Settings


class ByHand(NamedTuple):
    """Which methods and sites are meant, or the file that says so."""

    methods: list[str]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    plan: Path | None


def by_hand(
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method, with hyperparameters after a colon: linear_mix:group_size=8; default: "
            "linear_mix. With --target: one of those to choose from; repeatable."
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only sites matching this glob; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="No sites matching this glob; repeatable.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Decide as this file says, made by --save-plan.")
    ] = None,
) -> ByHand:
    """Return which methods and sites are meant."""
    if plan is not None and (method or include or exclude):
        raise RecipeError(f"--plan {plan} says what becomes of every site; leave --method and globs out")
    return ByHand(method or [], tuple(include or ()), tuple(exclude or ()), plan)


def deciding(
    named: ByHand,
    *,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT=AMOUNT",
            help="Let a planner decide: params, macs, size or latency; 50% is what remains, -40% the change, "
            "5MB an amount; repeatable. Needs --calibrate; --dry-run explains the choice.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            min=0,
            help="Instead of a target: the cheapest plan found in a few trials that loses at most so many "
            "points of top-1 on --data right after conversion, before any training.",
        ),
    ] = None,
    minimise: Annotated[
        Literal["params", "macs", "size", "latency"] | None,
        typer.Option(help="With --max-drop: what is to be cheap; default: macs."),
    ] = None,
    keep: Annotated[
        Literal["outputs", "capacity"] | None,
        typer.Option(
            help="With a planner: change the outputs least right after conversion, or keep the most "
            "parameters, which a network needs that is fine-tuned afterwards; default: outputs."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="With --max-drop: where accuracy is measured.")
    ] = None,
    runtime: Annotated[
        Literal["onnx", "torch"] | None,
        typer.Option(help="For latency: where it is measured; default: onnx."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="For latency: images per run; default: 1.")] = None,
    bench_threads: Annotated[
        int | None,
        typer.Option("--bench-threads", min=1, help="For latency: CPU threads; default: 1."),
    ] = None,
) -> "tuple[Rule, ...] | Budget":
    """Return the rules, or the budget within which a planner makes them."""
    from lcc.method_text import method_from_text
    from lcc.plan import rules_for
    from lcc.recipe import Budget
    from lcc.recipe_file import rules_from

    methods, include, exclude, plan = named
    given = {
        "minimise": minimise,
        "keep": keep,
        "data": data,
        "runtime": runtime,
        "batch": batch,
        "threads": bench_threads,
    }
    how = {key: value for key, value in given.items() if value is not None}
    if target or max_drop is not None:
        if plan is not None:
            raise RecipeError("--plan and a planner's --target both decide; leave one out")
        return checked(
            Budget,
            targets=tuple(target or ()),
            max_drop=max_drop,
            methods=tuple(methods),
            include=include,
            exclude=exclude,
            **how,
        )
    if how:
        name = next(iter(how))
        raise RecipeError(f"--{NAMES.get(name, name)} is for a planner; give it a --target or a --max-drop")
    if plan is not None:
        return rules_from(plan)
    if len(methods) > 1:
        raise RecipeError("several methods at once are for --target, or for the rules of a recipe")
    method = method_from_text(methods[0] if methods else "linear_mix")
    return rules_for(method, include, exclude)


@taking(part=source_part, base=running, settings=writing, named=by_hand, decision=deciding)
def convert(
    part: "ModelPart",
    settings: "Settings",
    decision: "tuple[Rule, ...] | Budget",
    *,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The lcc directory to write.")] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="DATA", help="Fit on unlabelled images, such as imagefolder:DIR.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="With --calibrate: how many images to fit on; default: 512.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and convert nothing.")] = False,
    save_plan: Annotated[
        Path | None,
        typer.Option("--save-plan", metavar="FILE", help="With a planner: write the plan, to be edited."),
    ] = None,
    check_errors: Annotated[
        bool,
        typer.Option(
            "--check-errors",
            help="With --target and --dry-run: convert every option alone, and say how well the errors "
            "that the plan rests on were predicted.",
        ),
    ] = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Replace convolutions by low-cost operators and write an lcc directory."""
    from lcc import pipeline
    from lcc.recipe import Calibrate

    calibration = None
    if calibrate is not None:
        count = {} if images is None else {"images": images}
        calibration = checked(Calibrate, data=calibrate, seed=part.seed, **count)
    elif images is not None:
        raise RecipeError("--images says how many of --calibrate DATA to look at; give --calibrate, too")
    planner = not isinstance(decision, tuple)
    _refuse_idle(out, save_plan, planner=planner, dry_run=dry_run, check_errors=check_errors, resume=resume)
    if planner and calibration is None:
        raise RecipeError(
            "a planner needs --calibrate DATA: images show what harms least; labels are not used"
        )
    if out is not None and not dry_run:
        report = pipeline.convert(
            part, out, decision, settings, calibration=calibration, resume=resume, save_plan=save_plan
        )
        print_report(report, form_of(as_json=as_json))
    elif isinstance(decision, tuple):
        print_inspection(pipeline.plan(part, decision, settings, calibration=calibration), as_json=as_json)
    elif calibration is not None:
        planned = pipeline.budget(
            part, decision, calibration, settings, save_plan=save_plan, check_errors=check_errors
        )
        print_plan(planned.report, as_json=as_json)


def _refuse_idle(
    out: Path | None,
    save_plan: Path | None,
    *,
    planner: bool,
    dry_run: bool,
    check_errors: bool,
    resume: bool,
) -> None:
    """Raise RecipeError for options that would do nothing, and where nothing says where the result goes."""
    if out is None and not dry_run:
        raise RecipeError("say where to put the result: -o DIR (or --dry-run to write nothing)")
    if resume and dry_run:
        raise RecipeError("--resume goes on with a conversion, --dry-run makes none: leave one of them out")
    if save_plan is not None and not planner:
        raise RecipeError("--save-plan writes what a planner decides; give it a --target or a --max-drop")
    if check_errors and not (planner and dry_run):
        raise RecipeError("--check-errors goes with --dry-run and a --target or a --max-drop")
