# SPDX-License-Identifier: GPL-3.0-or-later
"""The values of an envelope: client addresses, addresses and ESMTP parameters."""

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest

from milter import InetAddress, Params


def test_an_address_of_a_client_can_be_compared_with_networks() -> None:
    assert InetAddress("192.0.2.1", 25).ip == IPv4Address("192.0.2.1")
    assert InetAddress("2001:db8::5", 25).ip == IPv6Address("2001:db8::5")
    assert InetAddress("192.0.2.1", 25).ip in ip_network("192.0.2.0/24")


def test_parameters_are_found_in_any_case() -> None:
    params = Params(("size=100", "SMTPUTF8", "SIZE=2"))
    assert (params["Size"], params["smtputf8"]) == ("100", None)
    assert "smtputf8" in params
    assert "BODY" not in params
    number: object = 100
    assert number not in params
    assert params.get("BODY", "7BIT") == "7BIT"


def test_a_parameter_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="BODY"):
        Params(("SIZE=100",))["BODY"]


def test_each_keyword_counts_once_and_the_client_s_own_words_are_kept() -> None:
    params = Params(("size=100", "SMTPUTF8", "SIZE=2"))
    assert (list(params), len(params)) == (["SIZE", "SMTPUTF8"], 2)
    assert params.raw == ("size=100", "SMTPUTF8", "SIZE=2")
    assert repr(params) == "Params(['size=100', 'SMTPUTF8', 'SIZE=2'])"
