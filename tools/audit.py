"""What the environment has installed: each package's licence, and known vulnerabilities by pip-audit. Called by `make audit`.

It fails where a package names no licence, or where pip-audit knows a newer version that cures something. A machine that does not
reach the service behind pip-audit says so in one line and goes on.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

TIMEOUT_S = 180


def licence(package: importlib.metadata.Distribution) -> str:
    """In one line: the expression, else the classifiers, else the field's first line."""
    named = package.metadata.get_all("License-Expression") or []
    named = named or [
        row.rpartition(" :: ")[2]
        for row in package.metadata.get_all("Classifier") or []
        if row.startswith("License :: ")
    ]
    named = named or (package.metadata.get("License") or "").strip().splitlines()[:1]
    files = [
        str(file).rpartition("/")[2]
        for file in package.files or []
        if "licen" in str(file).lower() and ".dist-info" in str(file)
    ]
    return ", ".join(named) or ", ".join(f"see {name}" for name in files[:1])


def licences() -> int:
    packages = {package.metadata["Name"]: package for package in importlib.metadata.distributions()}
    found = {name: licence(packages[name]) for name in sorted(packages, key=str.lower)}
    for name, text in found.items():
        print(f"{name} {packages[name].version}: {text or 'NAMES NO LICENCE'}")
    return sum(not text for text in found.values())


def vulnerabilities() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--skip-editable",
        "--progress-spinner",
        "off",
        "--timeout",
        "10",
        "-f",
        "json",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        report = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        report = []
    skipped = [
        package["name"] for package in report if "skip_reason" in package
    ]  # all, where a mirror answers that has no such service
    if len(skipped) == len(report):
        print("pip-audit: not run, its service of vulnerabilities cannot be reached from here")
        return 0
    curable = 0
    for package in report:
        for found in package.get("vulns", []):
            cured = ", ".join(found["fix_versions"])
            curable += bool(cured)
            print(
                f"{package['name']} {package['version']}: {found['id']}, {f'cured in {cured}' if cured else 'no cure yet'}"
            )
    print(
        f"pip-audit: {len(report) - len(skipped)} packages, {curable} with a cure to take; not known to it: {', '.join(skipped) or 'none'}"
    )
    return curable


if __name__ == "__main__":
    sys.exit(1 if licences() + vulnerabilities() else 0)
