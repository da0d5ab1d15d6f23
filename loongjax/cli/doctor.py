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
from typing import Any

from loongjax import __version__
from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.config import engine_config

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
    """What `--json` prints."""
    from loongjax.api.build import plan_engine

    model, plan = plan_engine(options.model, engine_config(**llm_arguments(options)))
    import jax
    import jaxlib

    from loongjax.programs.buckets import MIGRATE_TOKENS
    from loongjax.programs.key import program_key

    catalogue, memory, shapes = plan.catalogue, plan.memory, plan.shapes
    topology, room = catalogue.topology, memory.room
    devices = [device for row in plan.grid for device in row]
    programs = []
    for spec in catalogue.specs:
        stored = plan.store.load(
            program_key(spec, shapes, plan.grid[0][0]), spec.degree * shapes.tp
        )
        programs.append(
            {
                "name": spec.name,
                **dataclasses.asdict(spec),
                "on_disk": stored is not None,
                "file_bytes": None if stored is None else len(stored.data),
                "temporary_bytes": None if stored is None else stored.temporary_bytes,
            }
        )
    known = [program["temporary_bytes"] for program in programs if program["temporary_bytes"]]
    measured = room.programs
    usable = memory.slots // shapes.block_size * shapes.block_size
    return {
        "versions": {
            "loongjax": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "platform": devices[0].client.platform_version,
        },
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "used": len(devices),
            "present": len(jax.devices()),
        },
        "topology": {
            "kind": type(topology).__name__,
            "instances": len(plan.grid),
            "tensor_parallel": shapes.tp,
            "groups": {str(degree): len(topology.groups(degree)) for degree in topology.degrees},
        },
        "model": {
            "family": model.family,
            "layers": model.layers,
            "max_positions": model.max_positions,
            "dtype": str(shapes.dtype),
            "attention_backend": shapes.attention_backend,
        },
        "memory": {
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
                "largest_group": usable * max(topology.degrees),
                "all": usable * len(plan.grid),
            },
        },
        "buckets": {
            "prefill": list(catalogue.chunk_buckets[:-1]),
            "extend": [catalogue.max_chunk_tokens],
            "decode": list(catalogue.row_buckets),
            "migrate": [MIGRATE_TOKENS],
        },
        "programs": {
            "folder": str(plan.store.folder.path),
            "trusted": None if plan.store.trusted is None else str(plan.store.trusted.path),
            "count": len(programs),
            "on_disk": sum(program["on_disk"] for program in programs),
            "to_compile": sum(not program["on_disk"] for program in programs),
            "rebound": not catalogue.placed,
            "catalogue": programs,
        },
    }


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    versions, devices, topology = report["versions"], report["devices"], report["topology"]
    model, memory, programs = report["model"], report["memory"], report["programs"]
    tokens = memory["tokens"]
    groups = ", ".join(f"{count} of {degree}" for degree, count in topology["groups"].items())
    lines = [
        *_rows(
            "versions",
            ("loongjax", versions["loongjax"]),
            ("jax, jaxlib", f"{versions['jax']}, {versions['jaxlib']}"),
            ("python", versions["python"]),
        ),
        *_rows(
            "devices",
            ("platform", f"{devices['platform']} ({devices['kind']})"),
            ("used", f"{devices['used']} of {devices['present']}"),
            ("kernels", model["attention_backend"]),
        ),
        *_rows(
            "topology",
            ("instances", f"{topology['instances']} of {topology['tensor_parallel']} device(s)"),
            ("groups", f"{groups} ({topology['kind']})"),
        ),
        *_rows(
            "memory of a device",
            ("free", _megabytes(memory["available_bytes"])),
            ("weights", f"{_megabytes(memory['weight_bytes'])} ({model['dtype']})"),
            ("temporaries", _megabytes(memory["temporary_bytes"])),
            ("code", _megabytes(memory["code_bytes"])),
            ("KV pool", f"{_megabytes(memory['pool_bytes'])}: {memory['slots']:,} slots"),
            ("tokens", f"{tokens['instance']:,} an instance, {tokens['all']:,} in all"),
        ),
        *_rows(
            "programs",
            ("folder", programs["folder"]),
            ("trusted library", programs["trusted"] or "none"),
            ("on disk", f"{programs['on_disk']} of {programs['count']}"),
            *((kind, ", ".join(map(str, sizes))) for kind, sizes in report["buckets"].items()),
        ),
    ]
    missing = Counter(
        (program["kind"], program["degree"])
        for program in programs["catalogue"]
        if not program["on_disk"]
    )
    lines += _rows(
        "to be compiled",
        *((f"{kind}, degree {degree}", str(count)) for (kind, degree), count in missing.items()),
    )
    return "\n".join(lines)


def _rows(title: str, *rows: tuple[str, str]) -> list[str]:
    return [title, *(f"  {name:20}{text}" for name, text in rows or [("nothing", "")])]


def _megabytes(size: int | None) -> str:
    return "not known yet" if size is None else f"{size / 1e6:,.1f} MB"
