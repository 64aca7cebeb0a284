"""Addresses of handlers, checked when they are configured: one that no request could go to fails at the start."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final
from urllib.parse import urlsplit

from safedefer.errors import ConfigurationError

_PRINTABLE: Final = "[!-~]{1,2048}"
#: Underscores are in the names of many container networks.
_LABEL: Final = "(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_MAX_NAME: Final = 253
#: How a netloc ends whose host is an IPv6 address.
_BRACKETED: Final = r"(?:^|@)\[[^\]]*\](?::[0-9]+)?$"


def check_address(what: str, address: str) -> None:
    """Check the address of a handler.

    Args:
        what: Begins the message: ``--to``, or which target it is.
        address: ``http://host[:port][/prefix]``, or with ``https``.

    Raises:
        ConfigurationError: No request could go there; the message says what to write instead.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigurationError(f"{what} must begin with http:// or https://; write the scheme before the host")
    if re.fullmatch(_PRINTABLE, address) is None:
        raise ConfigurationError(
            f"{what} has a space or a character that is not ASCII; write a host's name in punycode"
        )
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        raise ConfigurationError(f"{what} has a bracket without its other; write http://[::1]:8080") from None
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or parts.netloc.endswith(":"):
        raise ConfigurationError(f"{what} has a port that is none; write one from 1 to 65535, such as http://host:8080")
    if parts.query or parts.fragment or address.endswith(("?", "#")):
        raise ConfigurationError(f"{what} has a query or a fragment; write scheme, host, port and a prefix at most")
    bracketed = "[" in parts.netloc or "]" in parts.netloc
    if not (_is_ipv6(host) and re.search(_BRACKETED, parts.netloc) if bracketed else _is_name(host)):
        raise ConfigurationError(f"{what} has the host {host!a}, which is none; write a name or an IP address")


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


def _is_name(host: str) -> bool:
    """Whether it is an IPv4 address or the name of a host, which does not end in a number."""
    labels = host.removesuffix(".").split(".")
    if labels[-1].isdigit():
        try:
            IPv4Address(host)
        except ValueError:
            return False
        return True
    return len(host) <= _MAX_NAME and all(re.fullmatch(_LABEL, label) for label in labels)
