#!/usr/bin/env python3
"""Registers a server in a group, with Python's own library only, by the JSON gateway of etcd.

    register.py ETCD GROUP ID IP PORT [TTL]

for example register.py http://127.0.0.1:2379 workers w1 10.0.0.7 8080. It publishes the load of this machine,
registers again when its lease is lost, drains at SIGUSR1, and leaves at SIGTERM and Ctrl-C.
"""

import base64
import http.client
import json
import os
import signal
import sys
import time
import urllib.request

etcd, group, name, ip, port = sys.argv[1:6]
ttl = int(sys.argv[6]) if len(sys.argv) > 6 else 10
key = f"registry/{group}/{name}"
state = "serving"
is_leaving = False


def call(path, body):
    """One call of etcd. Numbers of 64 bits are texts in its JSON."""
    request = urllib.request.Request(f"{etcd}/v3/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=ttl / 3) as answer:
        # A stream answers a line for each message; only the first one is of interest.
        return json.loads(answer.readline())


def encoded(text):
    return base64.b64encode(text.encode()).decode()


def publish(lease):
    """Always with the lease: an entry without one stays for ever."""
    entry = {
        "id": name,
        "ip": ip,
        "port": int(port),
        "last_seen": int(time.time() * 1000),
        "state": state,
        "metadata": {"cpu_usage_percent": min(100.0, 100.0 * os.getloadavg()[0] / os.cpu_count())},
    }
    if is_leaving:
        entry["leaving"] = True
    call("kv/put", {"key": encoded(key), "value": encoded(json.dumps(entry)), "lease": lease})


def drain(*_):
    global state
    state = "draining"


def leave(*_):
    global is_leaving
    is_leaving = True


# What can go wrong with a call: no connection, an answer that is cut off, or one that says that it failed.
FAILURES = (OSError, ValueError, KeyError, http.client.HTTPException)

signal.signal(signal.SIGUSR1, drain)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)

lease = None
published = None
while not is_leaving:
    try:
        if lease is None:
            lease = call("lease/grant", {"TTL": ttl})["ID"]
            published = None
        answer = call("lease/keepalive", {"ID": lease})["result"]
        if int(answer.get("TTL", 0)) <= 0:
            # It is gone, with the entry: another one.
            lease = None
            continue
        # At once after a change of state, otherwise every 5 s.
        if published is None or published[0] != state or time.monotonic() - published[1] >= 5:
            publish(lease)
            published = (state, time.monotonic())
    except FAILURES as error:
        # etcd is away: what is registered stays for as long as the lease.
        print(f"register.py: {error!r}", file=sys.stderr, flush=True)
    time.sleep(min(1, ttl / 3))

if lease is not None:
    state = "draining"
    try:
        publish(lease)
        call("lease/revoke", {"ID": lease})
    except FAILURES as error:
        # The lease ends the entry.
        print(f"register.py: {error!r}", file=sys.stderr, flush=True)
