#!/usr/bin/env python3
"""Checks compose.yaml against the Compose specification, and servicemonitor.yaml against the Prometheus operator's types.

Run by packaging_check.sh, in its environment.
"""

import pathlib
import sys

import compose_spec
import yaml
from cloudcoil.models.prometheus_operator import v1

PACKAGING = pathlib.Path(__file__).resolve().parent.parent / "packaging"


def main():
    """Fails on the first field that is unknown or of another type."""
    compose_spec.PyCompose.from_yaml((PACKAGING / "compose.yaml").read_text())
    print("   compose.yaml is of the Compose specification")
    monitor = yaml.safe_load((PACKAGING / "kubernetes/servicemonitor.yaml").read_text())
    read = v1.ServiceMonitor.model_validate(monitor).model_dump(by_alias=True, exclude_unset=True, mode="json")
    # The types overlook fields they do not know.
    if {**monitor, **read} != monitor or read["spec"] != monitor["spec"]:
        sys.exit(f"   servicemonitor.yaml: fields that the operator does not know\n   {monitor}\n   {read}")
    print("   servicemonitor.yaml is of the Prometheus operator's types")


if __name__ == "__main__":
    main()
