# SPDX-License-Identifier: GPL-3.0-or-later
"""A server's certificate for STARTTLS, signed by itself."""

import subprocess
from pathlib import Path


def make_certificate(directory: Path, name: str = "mta.test") -> None:
    """Write `cert.pem` and `key.pem`; the key is for its owner alone, or a server would refuse it."""
    key = directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "3650", "-newkey", "ec"),
            *("-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", f"/O=Tests/CN={name}"),
            *("-keyout", str(key), "-out", str(directory / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
