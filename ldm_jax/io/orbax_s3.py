"""Orbax checkpoints in ``s3://``.

TensorStore reads and writes S3; Orbax 0.12 knows ``gs://`` alone and refuses other URLs. Four names
of it decide which paths are in a bucket and how TensorStore opens them: they are extended to S3, so
that a checkpoint there is written as one in ``gs://``, with a commit file in place of a rename.
"""

import functools
import os
from typing import Any

S3 = "s3://"
BUCKETS = ("gs://", S3)


@functools.cache
def enable() -> None:
    """Lets Orbax use ``s3://``; further calls do nothing."""
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    of_gcs, normalized = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def store(path: str) -> dict[str, Any]:
        return kvstore(path) if path.startswith(S3) else of_gcs(path)

    gcs_utils._GCS_PATH_PREFIX = BUCKETS
    gcs_utils.get_kvstore_for_gcs = store
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(BUCKETS)
    tensorstore_utils._normalize_path = lambda path: normalized(path).replace("s3:/", S3)


def kvstore(path: str) -> dict[str, Any]:
    """Returns TensorStore's specification of a path in S3.

    TensorStore's driver finds credentials as AWS' own programs do, but not a service of another
    endpoint (MinIO, R2 and others), which those take from AWS_ENDPOINT_URL.
    """
    bucket, _, name = path.removeprefix(S3).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": name}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    return spec
