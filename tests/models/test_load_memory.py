"""How much host memory loading takes: a shard of a tensor and a block, never a tensor twice."""

from __future__ import annotations

import json
import subprocess
import sys

LARGEST = 384 * 2**20  # what the decoders of stored chunks take does not grow with it
SCRIPT = f"""
import dataclasses, json, sys, threading, time, psutil
from loongjax.checkpoint import convert
from loongjax.models import random_weights
shape = random_weights.random_config("tiny")
random_weights._SHAPES["wide"] = dataclasses.replace(
    shape, vocab_size={LARGEST} // (4 * shape.width), tied_embeddings=True
)
if sys.argv[1] == "convert":
    convert("random:wide", __import__("pathlib").Path(sys.argv[2]), to="orbax")
    sys.exit()
import jax
from loongjax.models.placement import place_weights
from loongjax.models.resolve import resolve

model = resolve(sys.argv[2])
process, peak, over = psutil.Process(), [0], threading.Event()
jax.block_until_ready(jax.numpy.zeros(8) + 1)

def watch():
    while not over.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.001)

before = process.memory_info().rss
watching = threading.Thread(target=watch)
watching.start()
placed = place_weights(model.config, model.source, [jax.devices()[:1]], "float32", stacked=False)
over.set()
watching.join()
held = sum(leaf.shards[0][0].nbytes for leaf in jax.tree.leaves(placed.tree))
print(json.dumps({{"peak": peak[0] - before, "held": held}}))
"""


def test_beside_what_devices_hold_it_takes_a_third_of_the_largest_tensor(tmp_path):
    def run(what):
        command = [sys.executable, "-c", SCRIPT, what, str(tmp_path / "wide")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    run("convert")
    measured = json.loads(run("restore"))
    # On CPU the devices hold the very memory that the host has filled. Elsewhere the host's
    # copy of a shard comes on top, which makes it 1.3 times the largest tensor.
    assert measured["peak"] - measured["held"] < 0.3 * LARGEST
