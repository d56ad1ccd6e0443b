"""Trace the graphs that ship with Kiln, and the table of config defaults they are looked up by.

Run after a change of the tracer: python tools/make_graphs.py [--config NAME=FOLDER ...] [--only COMPONENT]
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from kiln.components import COMPONENTS, CONTRACTS
from kiln.exporters import graphs, tracing

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "exporters/data"


def write_defaults() -> None:
    """Save the constructor defaults of the classes that Kiln traces."""
    import diffusers
    from transformers import CLIPTextConfig

    table: dict[str, Any] = {}
    for name in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        table[name] = {
            k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty
        }
    table["CLIPTextConfig"] = {k: v for k, v in CLIPTextConfig().to_dict().items() if k in graphs._CLIP_KEYS}
    (DATA / "config_defaults.json").write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Trace every component of every configuration named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", action="append", metavar="NAME=FOLDER", help="default: sd1 and the bundled model"
    )
    parser.add_argument("--only", action="append", choices=COMPONENTS)
    args = parser.parse_args()
    write_defaults()
    for item in args.config or [
        f"sd1={DATA / 'sd1'}",
        f"emoji={ROOT / 'models/emoji'}",
        f"taesd={DATA / 'taesd'}",
    ]:
        name, folder = item.split("=", 1)
        for component in args.only or COMPONENTS:
            path = Path(folder) / CONTRACTS[component].network / "config.json"
            if not path.exists():
                continue
            config = json.loads(path.read_text())
            digest = graphs.architecture_digest(component, config)
            for old in graphs.shipped_folder().glob(f"{name}-{component}-*.onnx.xz"):
                old.unlink()
            graphs.save_graph(
                tracing.trace(component, config), DATA / f"graphs/{name}-{component}-{digest}.onnx.xz"
            )
            print(name, component, digest, flush=True)


if __name__ == "__main__":
    main()
