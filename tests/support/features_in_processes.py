"""One of several processes that compare a set of images with a reference together.

    python features_in_processes.py PORT INDEX COUNT SET REFERENCE

Prints the number of images, the distance and the precision that this process found.
"""

import sys
from pathlib import Path

import jax

PORT, INDEX, COUNT, SET, REFERENCE = sys.argv[1:]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", int(COUNT), int(INDEX))

from ibq_jax.base.sharding import make_mesh  # noqa: E402
from ibq_jax.evaluate.feature_nets import FD, find_feature_nets  # noqa: E402
from ibq_jax.evaluate.protocols import PROTOCOLS  # noqa: E402
from ibq_jax.evaluate.sample_statistics import FeatureExtractor, ImageSet, compare  # noqa: E402

extractor = FeatureExtractor(find_feature_nets(["efficientnet"], {}), PROTOCOLS["adm"], make_mesh({"data": -1}))
samples, reference = (extractor(ImageSet(Path(path)).batches(8)) for path in (SET, REFERENCE))
found = dict(compare(samples, reference, PROTOCOLS["adm"]))
print("found", samples.statistics[FD].count, repr(found[FD]), repr(found["precision (EfficientNetLite0)"]))
