"""The manifest of docs/scale.md, by the schemas of Kubernetes."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"


@pytest.fixture
def manifest() -> dict:
    found = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


def job_of(manifest: dict) -> dict:
    """The Job that JobSet makes of its first template."""
    (one,) = manifest["spec"]["replicatedJobs"]
    head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": one["name"]}}
    return head | one["template"]


def test_the_job_fits_the_schema_of_kubernetes(manifest):
    if importlib.util.find_spec("kubernetes_validate") is None:
        pytest.skip("the manifest is validated where kubernetes-validate is installed")
    import kubernetes_validate

    job = job_of(manifest)
    kubernetes_validate.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_the_hosts_are_those_of_the_slice(manifest):
    assert manifest["kind"] == "JobSet"
    spec = job_of(manifest)["spec"]
    pod = spec["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert spec["parallelism"] == spec["completions"] == int(rows) * int(columns) // chips
    # A pod that ends is not started alone: the whole slice starts again.
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
