"""`loongjax doctor`: what an engine would be made of, without making it.

Takes the options of `generate` and decides all sizes as a start would; compiles and loads
nothing, but for the pool's size on an accelerator that has none yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections import Counter
from typing import TYPE_CHECKING, Any

from loongjax import __version__
from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.config import engine_config

if TYPE_CHECKING:
    from loongjax.executor.create import ExecutorPlan
    from loongjax.models.config import ModelConfig

_EPILOG = """\
examples:
  loongjax doctor --model demo --instances 4 --degrees 1,2,4
  loongjax doctor --model random:bench58m --dtype bfloat16 --json
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `doctor` to the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="show devices, memory, and which programs exist",
        description="Shows what an engine with these options would be made of: devices, groups, "
        "memory, and for each program whether it is on disk or would be compiled.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the report, as a table or as JSON."""
    report = examine(options)
    print(json.dumps(report) if options.json else describe(report), flush=True)


def examine(options: argparse.Namespace) -> dict[str, Any]:
    """What `--json` prints: a function for each part of it."""
    from loongjax.api.build import plan_engine

    model, plan = plan_engine(options.model, engine_config(**llm_arguments(options)))
    catalogue = _catalogue(plan)
    return {
        "versions": _versions(plan),
        "devices": _devices(plan),
        "topology": _topology(plan),
        "model": _model(model, plan),
        "memory": _memory(plan, catalogue),
        "buckets": _buckets(plan),
        "programs": _programs(plan, catalogue),
    }


def _versions(plan: ExecutorPlan) -> dict[str, Any]:
    import jax
    import jaxlib

    return {
        "loongjax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "platform": plan.grid[0][0].client.platform_version,
    }


def _devices(plan: ExecutorPlan) -> dict[str, Any]:
    import jax

    first = plan.grid[0][0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "used": sum(len(row) for row in plan.grid),
        "present": len(jax.devices()),
    }


def _topology(plan: ExecutorPlan) -> dict[str, Any]:
    topology = plan.catalogue.topology
    return {
        "kind": type(topology).__name__,
        "instances": len(plan.grid),
        "tensor_parallel": plan.shapes.tp,
        "groups": {str(degree): len(topology.groups(degree)) for degree in topology.degrees},
    }


def _model(model: ModelConfig, plan: ExecutorPlan) -> dict[str, Any]:
    return {
        "family": model.family,
        "layers": model.layers,
        "max_positions": model.max_positions,
        "dtype": str(plan.shapes.dtype),
        "attention_backend": plan.shapes.attention_backend,
    }


def _memory(plan: ExecutorPlan, catalogue: list[dict[str, Any]]) -> dict[str, Any]:
    memory, room, block_size = plan.memory, plan.memory.room, plan.shapes.block_size
    known = [program["temporary_bytes"] for program in catalogue if program["temporary_bytes"]]
    measured = room.programs
    usable = memory.slots // block_size * block_size
    return {
        "available_bytes": room.available_bytes,
        "weight_bytes": room.weight_bytes,
        "temporary_bytes": measured.temporary_bytes if measured else max(known, default=None),
        "code_bytes": measured.code_bytes if measured else None,
        "pool_bytes": memory.pool_bytes,
        "slot_bytes": room.slot_bytes,
        "slots": memory.slots,
        "origin": memory.origin,
        "tokens": {
            "instance": usable,
            "largest_group": usable * max(plan.catalogue.topology.degrees),
            "all": usable * len(plan.grid),
        },
    }


def _buckets(plan: ExecutorPlan) -> dict[str, Any]:
    from loongjax.programs.buckets import MIGRATE_TOKENS

    return {
        "prefill": sorted({*plan.catalogue.chunk_buckets} - {*plan.catalogue.extend_buckets}),
        "extend": list(plan.catalogue.extend_buckets),
        "decode": list(plan.catalogue.row_buckets),
        "migrate": [MIGRATE_TOKENS],
    }


def _programs(plan: ExecutorPlan, catalogue: list[dict[str, Any]]) -> dict[str, Any]:
    trusted = plan.store.trusted
    return {
        "folder": str(plan.store.folder.path),
        "trusted": None if trusted is None else str(trusted.path),
        "count": len(catalogue),
        "on_disk": sum(program["on_disk"] for program in catalogue),
        "to_compile": sum(not program["on_disk"] for program in catalogue),
        "rebound": not plan.catalogue.placed,
        "catalogue": catalogue,
    }


def _catalogue(plan: ExecutorPlan) -> list[dict[str, Any]]:
    """Every program that the engine would have, and what is known of those on disk."""
    from loongjax.programs.key import program_key

    shapes, device = plan.shapes, plan.grid[0][0]
    found = []
    for spec in plan.catalogue.specs:
        stored = plan.store.load(program_key(spec, shapes, device), spec.degree * shapes.tp)
        found.append(
            {
                "name": spec.name,
                **dataclasses.asdict(spec),
                "on_disk": stored is not None,
                "file_bytes": None if stored is None else len(stored.data),
                "temporary_bytes": None if stored is None else stored.temporary_bytes,
            }
        )
    return found


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = _describe_versions(report["versions"])
    lines += _describe_devices(report)
    lines += _describe_memory(report["memory"], report["model"]["dtype"])
    lines += _describe_programs(report["programs"], report["buckets"])
    lines += _describe_missing(report["programs"]["catalogue"])
    return "\n".join(lines)


def _describe_versions(versions: dict[str, Any]) -> list[str]:
    return _rows(
        "versions",
        ("loongjax", versions["loongjax"]),
        ("jax, jaxlib", f"{versions['jax']}, {versions['jaxlib']}"),
        ("python", versions["python"]),
    )


def _describe_devices(report: dict[str, Any]) -> list[str]:
    devices, topology = report["devices"], report["topology"]
    groups = ", ".join(f"{count} of {degree}" for degree, count in topology["groups"].items())
    return [
        *_rows(
            "devices",
            ("platform", f"{devices['platform']} ({devices['kind']})"),
            ("used", f"{devices['used']} of {devices['present']}"),
            ("kernels", report["model"]["attention_backend"]),
        ),
        *_rows(
            "topology",
            ("instances", f"{topology['instances']} of {topology['tensor_parallel']} device(s)"),
            ("groups", f"{groups} ({topology['kind']})"),
        ),
    ]


def _describe_memory(memory: dict[str, Any], dtype: str) -> list[str]:
    tokens = memory["tokens"]
    return _rows(
        "memory of a device",
        ("free", _megabytes(memory["available_bytes"])),
        ("weights", f"{_megabytes(memory['weight_bytes'])} ({dtype})"),
        ("temporaries", _megabytes(memory["temporary_bytes"])),
        ("code", _megabytes(memory["code_bytes"])),
        ("KV pool", f"{_megabytes(memory['pool_bytes'])}: {memory['slots']:,} slots"),
        ("tokens", f"{tokens['instance']:,} an instance, {tokens['all']:,} in all"),
    )


def _describe_programs(programs: dict[str, Any], buckets: dict[str, Any]) -> list[str]:
    return _rows(
        "programs",
        ("folder", programs["folder"]),
        ("trusted library", programs["trusted"] or "none"),
        ("on disk", f"{programs['on_disk']} of {programs['count']}"),
        *((kind, ", ".join(map(str, sizes))) for kind, sizes in buckets.items()),
    )


def _describe_missing(catalogue: list[dict[str, Any]]) -> list[str]:
    missing = Counter(
        (program["kind"], program["degree"]) for program in catalogue if not program["on_disk"]
    )
    return _rows(
        "to be compiled",
        *((f"{kind}, degree {degree}", str(count)) for (kind, degree), count in missing.items()),
    )


def _rows(title: str, *rows: tuple[str, str]) -> list[str]:
    return [title, *(f"  {name:20}{text}" for name, text in rows or [("nothing", "")])]


def _megabytes(size: int | None) -> str:
    return "not known yet" if size is None else f"{size / 1e6:,.1f} MB"
