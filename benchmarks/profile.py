"""Where the time of a round goes: XLA's operations, by the layer they serve.

    python -m benchmarks.profile --model=cnn --clients=40 --page=docs/performance.md

Runs the round of `benchmarks.federated` under JAX's profiler and adds up the
seconds of each compiled operation over all devices. An operation belongs to
what its name in the program says: forward pass or gradient of a layer, pooling,
the SGD step, the sum of the updates. What a device neither computes nor waits
for in an operation is the loop itself.
"""

import argparse
import collections
import glob
import gzip
import json
import os
import pathlib
import re
import tempfile
from typing import Any

import numpy as np

from benchmarks import federated, federated_task, page
