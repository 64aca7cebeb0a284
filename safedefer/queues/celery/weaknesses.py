"""How a broker may lose messages that it has accepted."""

from __future__ import annotations

from typing import Any


def weaknesses_of_redis(client: Any) -> list[str]:
    """Ask a server of Redis or Valkey what it keeps on its disk, and what it deletes."""
    found = []
    log = client.info("persistence").get("aof_enabled")
    try:
        synced = client.config_get("appendfsync").get("appendfsync")
    except Exception:  # noqa: BLE001  # a hosted server that answers no CONFIG
        synced = None
    if not log:
        found.append("it keeps no log of its writes: when it ends it has forgotten the tasks since its last snapshot, or all; "
                     "set appendonly yes and appendfsync always")  # fmt: skip
    elif synced not in {None, "always"}:
        found.append(
            f"it does not sync each write (appendfsync {synced}): a power cut loses the last tasks; set appendfsync always"
        )
    policy = client.info("memory").get("maxmemory_policy")
    if policy not in {None, "noeviction"}:
        found.append(
            f"it deletes tasks when its memory is full (maxmemory-policy {policy}); set maxmemory-policy noeviction"
        )
    return found
