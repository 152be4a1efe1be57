#!/usr/bin/env bash
# Registers a server in a group, with curl only, by the JSON gateway of etcd.
#
#     register.sh ETCD GROUP ID IP PORT [TTL]
#
# It registers again when its lease is lost, drains at SIGUSR1, and leaves at SIGTERM and Ctrl-C.
set -uo pipefail

etcd=$1 name=$3 ip=$4 port=$5 ttl=${6:-10}
key=registry/$2/$3
state=serving lease=
leaving=

# Fails, and says nothing, if etcd refuses.
call() { curl -sSf -m "$ttl" -X POST "$etcd/v3/$1" -d "$2"; }
encoded() { printf %s "$1" | base64 -w0; }
# The value of a field, which is a number or a text of digits.
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([0-9]*\).*/\1/p" | head -n 1; }

# Always with the lease: an entry without one stays for ever.
publish() {
    local load entry
    load=$(cut -d ' ' -f 1 /proc/loadavg)
    entry="{\"id\":\"$name\",\"ip\":\"$ip\",\"port\":$port,\"last_seen\":$(date +%s%3N),\"state\":\"$state\"$leaving,"
    entry+="\"metadata\":{\"queue_depth\":$load}}"
    call kv/put "{\"key\":\"$(encoded "$key")\",\"value\":\"$(encoded "$entry")\",\"lease\":\"$lease\"}" >/dev/null
}

leave() {
    if [ -n "$lease" ]; then
        state=draining leaving=',"leaving":true'
        publish
        call lease/revoke "{\"ID\":\"$lease\"}" >/dev/null
    fi
    exit 0
}

trap 'state=draining' USR1
trap leave TERM INT

published=
while true; do
    if [ -z "$lease" ]; then
        lease=$(call lease/grant "{\"TTL\":$ttl}" | field ID)
        published=
    fi
    if [ -n "$lease" ]; then
        answer=$(call lease/keepalive "{\"ID\":\"$lease\"}")
        # Anything but a result: etcd is away, and what is registered stays for as long as the lease.
        if [[ $answer == *'"result"'* ]]; then
            left=$(printf %s "$answer" | field TTL)
            if [ "${left:-0}" -le 0 ]; then
                # It is gone, with the entry: another one.
                lease=
                continue
            fi
            # At once after a change of state, otherwise every 5 s.
            if [ "${published%% *}" != "$state" ] || [ $((SECONDS - ${published##* })) -ge 5 ]; then
                publish && published="$state $SECONDS"
            fi
        fi
    fi
    # A signal ends the wait.
    sleep 1 &
    wait $!
done
