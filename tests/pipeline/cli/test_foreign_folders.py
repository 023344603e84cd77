"""The script `jkoflow` finds its own packages in a folder that has folders of their names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.pipeline.tiny import ROOT

SCRIPT = "import sys\nfrom pipeline.cli.main import main\nsys.exit(main())\n"


def test_the_script_ignores_folders_of_the_names_of_packages(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "jkoflow"
    script.parent.mkdir()
    script.write_text(SCRIPT)  # as pip writes it: its own folder is first on the path
    for name in ("configs", "pipeline", "flows", "eval", "autoencoders"):
        foreign = tmp_path / "work" / name
        foreign.mkdir(parents=True)
        (foreign / "__init__.py").write_text("raise RuntimeError('a foreign package')\n")
    (tmp_path / "work" / "configs" / "flows").mkdir()
    (tmp_path / "work" / "configs" / "flows" / "demo.yaml").write_text("nonsense: 1\n")
    done = subprocess.run(
        [sys.executable, str(script), "encode", "-c", "demo", "--set", "data.limit=0"],
        cwd=tmp_path / "work", env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "data.limit is 0; expected" in last, last
