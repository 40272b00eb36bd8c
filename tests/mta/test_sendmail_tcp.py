# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark of Sendmail over TCP measures messages that were really taken."""

import pytest

from benchmarks.sendmail_tcp import QUEUE_ONLY, milliseconds

from .sendmail import Sendmail


def test_each_measured_message_lies_in_the_queue(sendmail: Sendmail) -> None:
    assert milliseconds(sendmail.service(**QUEUE_ONLY), messages=3) > 0
    assert sendmail.deliveries() == []
    assert len(sendmail.queue()) == 3


def test_a_refused_message_is_told(sendmail: Sendmail) -> None:
    port = sendmail.milter_service("unix:/nonexistent/filter", **QUEUE_ONLY)
    with pytest.raises(SystemExit, match="Sendmail refuses the message: 451"):
        milliseconds(port, messages=1)
