"""`axolotl tvac run`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tvac_plugin.boundary.errors import UserError, bullets, printable

if TYPE_CHECKING:
    from tvac_plugin.chain.jobs import ChainPlan, Job
    from tvac_plugin.chain.recipe import Chain


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Write the resolved recipes and print the commands, but run nothing.")
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Change a key of a stage's recipe.")
@click.option(
    "--jobs", "num_parallel", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="Run up to N jobs at a time. Each job uses all visible GPUs, so this is for CPUs: with a GPU leave it at 1.",
)  # fmt: skip
def run(recipe: Path, dry_run: bool, overrides: tuple[str, ...], num_parallel: int) -> None:
    """Run the chain in RECIPE: alignment, attack, evaluation, report. Run it again to continue."""
    from tvac_plugin.chain.preflight import chain_problems
    from tvac_plugin.chain.recipe import read_chain
    from tvac_plugin.recipes.reading import foreign_code, kind_problems, read_recipe
    from tvac_plugin.report.pages import write_report
    from tvac_plugin.report.terminal import chain_table

    other_kind = kind_problems(read_recipe(recipe), "a chain")
    if other_kind:
        raise UserError(f"{recipe}: {other_kind[0]}")
    chain = read_chain(recipe, overrides)
    jobs = _first_jobs(chain)
    for line in dict.fromkeys(f"{job.stage}: {line}" for job in jobs.values() for line in foreign_code(job.recipe)):
        click.echo(printable(line), err=True)
    problems = chain_problems(chain)
    if problems:
        raise UserError(f"{recipe} cannot run:\n{bullets(problems)}")
    if dry_run:
        for name in ("search", "attacker"):
            if (block := getattr(chain.recipe, name)) is not None:
                click.echo(
                    f"{name}: {block.trials} trials an arm, of which these are the ends of open values.", err=True
                )
        for job in jobs.values():
            job.write_recipe()
            click.echo(shlex.join(job.command))
        return
    try:
        results = run_chain(chain, say=click.echo, num_parallel=num_parallel)
    except KeyboardInterrupt as error:
        raise UserError("stopped, and so are its jobs. The same command goes on where this one stopped.") from error
    page = write_report(Path(chain.recipe.output_dir))
    click.echo("\n" + chain_table(results))
    click.echo(f"\nreport: {page}")
    if any(cell["status"] != "finished" for cell in results["cells"]):
        raise UserError("some cells failed; the table says why. Fix that and run the same command again.")


def run_chain(
    chain: Chain,
    *,
    say: Callable[[str], None],
    num_parallel: int = 1,
    plan_of: Callable[[Chain], ChainPlan] | None = None,
) -> dict[str, Any]:
    """Runs a chain with the trials of its `search:` before it and those of its `attacker:` after it, if it has them.

    Writes `results.json`.

    Args:
        chain: Without problems.
        say: Told about each job.
        num_parallel: How many jobs may run at a time.
        plan_of: Spreads a chain out into jobs; `ChainPlan` without.

    Returns:
        What is in `results.json`.

    Raises:
        UserError: All trials of an arm failed, or the chain is already running.
    """
    from tvac_plugin.chain.attacker import attacked
    from tvac_plugin.chain.jobs import ChainPlan
    from tvac_plugin.chain.results import collect, gather
    from tvac_plugin.chain.runner import run_plan
    from tvac_plugin.chain.search import searched

    make_plan = plan_of or ChainPlan

    def cells(trial: Chain) -> list[Mapping[str, Any]]:
        plan = make_plan(trial)
        found: list[Mapping[str, Any]] = gather(plan, run_plan(plan, say=say, num_parallel=num_parallel))["cells"]
        return found

    found: dict[str, Any] = {}
    if chain.recipe.search is not None:
        chain, found["search"] = searched(chain, cells, say)
    plan = make_plan(chain)
    states = run_plan(plan, say=say, num_parallel=num_parallel)
    if chain.recipe.attacker is not None:
        found["attacker"] = attacked(chain, cells, say)
    return collect(plan, states, found)


def _first_jobs(chain: Chain) -> dict[str, Job]:
    """The jobs of a chain; of trials, those at the ends, for later ones follow from the first."""
    from tvac_plugin.chain.attacker import outer_chains
    from tvac_plugin.chain.jobs import ChainPlan

    return {name: job for each in outer_chains(chain) for name, job in ChainPlan(each).jobs.items()}
