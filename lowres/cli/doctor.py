"""`lowres doctor`: is this machine ready, and what mends what is not."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    name="doctor",
    epilog="example: lowres doctor",
)
def command(
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure the device instead, for `lowres plan` to use."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check packages, devices, memory, disk, compilers, hub and data.

    Exit 1 when a required package is missing or out of its range.
    """
    from lowres.run.diagnosis import diagnose

    if calibrate:
        found = _calibration()
        typer.echo(json.dumps(found, indent=1) if as_json else _table(found))
        return
    checks = diagnose()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(c) for c in checks], indent=1))
    else:
        width = max(len(c.name) for c in checks)
        for c in checks:
            typer.echo(f"{c.status:<7}  {c.name:<{width}}  {c.found}")
            if c.mend:
                typer.echo(f"{'':<7}  {'':<{width}}  -> {c.mend}")
        counts = {s: sum(c.status == s for c in checks) for s in ("ok", "warning", "missing")}
        typer.echo(", ".join(f"{n} {status}" for status, n in counts.items()))
    if any(c.status == "missing" for c in checks):
        raise typer.Exit(1)


def _calibration() -> dict[str, Any]:
    """What was measured on this machine's device, and under `path` where it is stored."""
    import torch

    from lowres.memory import calibrate, device

    mps = "mps" if torch.backends.mps.is_available() else "cpu"
    measured = torch.device("cuda" if torch.cuda.is_available() else mps)
    found = calibrate.to_dict(calibrate.calibrate(measured))  # first: it wants CUDA untouched
    return {**found, "path": str(device.calibration_path(device.of_torch(measured)))}


def _table(found: dict[str, Any]) -> str:
    from lowres.core.units import format_bytes

    figures = found["figures"]
    rows = [("device", f"{found['name']}, measured in {found['seconds']:.1f} s")]
    rows += [(dtype, f"{rate / 1e12:.3g} TFLOP/s") for dtype, rate in figures["rates"].items()]
    rows += [
        (name, f"{source[key] / 1e9:.3g} GB/s")
        for name, source, key in (
            ("memory", figures, "bandwidth_bytes_per_second"),
            ("to device", found, "to_device_bytes_per_second"),
            ("to host", found, "to_host_bytes_per_second"),
        )
        if key in source
    ]
    rows.append(("one operation", f"{figures['launch_seconds'] * 1e6:.3g} microseconds"))
    if "matmul_handles" in found:
        each = format_bytes(figures["matmul_workspace_bytes"])
        rows.append(("cuBLAS", f"{found['matmul_handles']} workspaces of {each}"))
        rows.append(("context", format_bytes(figures.get("context_bytes"))))
    rows.append(("stored in", found["path"]))
    return "\n".join(f"{name:<13}  {text}" for name, text in rows)
