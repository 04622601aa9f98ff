"""Commands without an option for it ask nothing of another computer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from files import make_image_folder

COMMANDS = """
train --model vit_mini_patch4_28 --num_tokens 2 --epochs 1 --data folder --root data --img_size 28
  --model_kwargs {"embed_dim":16,"depth":2,"patch_size":7,"num_heads":2} --batch_size 4 --out run
eval run
predict run data/val
maps run data/val maps
report run
plan vit_mini_patch4_28
export run run.onnx --rounds 2
eval run.onnx --data folder --root data --img_size 28
bench run --rounds 2 --batch_size 1
models *mini*
eval nowhere
eval runs/nowhere
train --model runs/nowhere --out new
"""
SCRIPT = """
import sys

def report(event, args):
    place = {"socket.connect": 1, "socket.bind": 1, "socket.sendto": 1, "socket.getaddrinfo": 0,
             "socket.gethostbyname": 0, "socket.sendmsg": 1}.get(event)
    if place is None:
        return
    where = args[place][0] if isinstance(args[place], tuple) else args[place]
    if isinstance(args[place], tuple) or event.startswith("socket.get"):
        if str(where) not in ("127.0.0.1", "::1", "localhost"):
            sys.stderr.write(f"NETWORK {event} {args}\\n")

sys.addaudithook(report)
from tokenlearner.commands.main import main

for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as end:
        print("ended", line, end.code)
"""


@pytest.mark.slow
def test_no_command_opens_a_connection_unless_it_is_told_to(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "data", "ab", count=4)
    lines = COMMANDS.replace("\n ", " ").split("\n")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *filter(None, lines)],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert len(ended) == 3, done.stdout + done.stderr  # what is nowhere
