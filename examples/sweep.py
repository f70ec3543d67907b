"""A sweep from Python: what gradient pruning costs and hides, ratio by ratio.

python examples/sweep.py
"""

import json
import pathlib
import sys

from experiments import config, main

place = pathlib.Path(sys.argv[1] if sys.argv[1:] else "runs") / "sweep"
for ratio in (0.5, 0.9, 0.99):
  values = config.make(
    model="lenet_zhu",
    num_clients=300,
    size_sigma=1.8,
    batch_size=4,
    client_lr=0.3,
    rounds=5,
    defense=(f"prune(ratio={ratio})",),
    attack=("inverting_gradients(iterations=200)",),
    output_dir=str(place / f"ratio_{ratio}"),
    overwrite=True,
  )
  folder = main.measure(values)  # a run without a report
  summary = json.loads((folder / "summary.json").read_text())
  (entry,) = summary["defenses"].values()
  attack = entry["attacks"]["inverting_gradients"]["blind"]
  print(
    f"ratio {ratio}: accuracy {entry['test_accuracy']:.1%},"
    f" {entry['uplink_bytes_per_client']:,.0f} bytes,"
    f" PSNR {attack['psnr_db_median']:.1f} dB"
  )
