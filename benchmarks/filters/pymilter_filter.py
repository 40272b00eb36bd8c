# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter with pymilter: ``pymilter_filter.py replying|observing|noreply SOCKET``.

``observing`` says @noreply for header and body, ``noreply`` for each stage that may.
"""

import sys

import Milter


class Replying(Milter.Base):
    def __init__(self):
        self.sum = 0

    def connect(self, hostname, family, address):
        return Milter.CONTINUE

    def hello(self, name):
        return Milter.CONTINUE

    def envfrom(self, sender, *params):
        self.sum = 0
        return Milter.CONTINUE

    def envrcpt(self, recipient, *params):
        return Milter.CONTINUE

    def data(self):
        return Milter.CONTINUE

    @Milter.decode("bytes")
    def header(self, name, value):
        self.sum += len(value)
        return Milter.CONTINUE

    def eoh(self):
        return Milter.CONTINUE

    def body(self, chunk):
        self.sum += len(chunk)
        return Milter.CONTINUE

    def eom(self):
        self.addheader("X-Sum", str(self.sum))
        return Milter.CONTINUE


class Observing(Replying):
    header = Milter.noreply(Replying.header)
    body = Milter.noreply(Replying.body)


class NoReply(Observing):
    connect = Milter.noreply(Replying.connect)
    hello = Milter.noreply(Replying.hello)
    envfrom = Milter.noreply(Replying.envfrom)
    envrcpt = Milter.noreply(Replying.envrcpt)
    data = Milter.noreply(Replying.data)
    eoh = Milter.noreply(Replying.eoh)


KINDS = {"replying": Replying, "observing": Observing, "noreply": NoReply}

if __name__ == "__main__":
    Milter.factory = KINDS[sys.argv[1]]
    Milter.set_flags(Milter.ADDHDRS)
    Milter.runmilter("benchmark", sys.argv[2])
