#!/usr/bin/env bash
# Registers a server in a group, with etcdctl only.
#
#     register_etcdctl.sh ETCD GROUP ID IP PORT [TTL]
#
# It registers again when its lease is lost, drains at SIGUSR1, and leaves at SIGTERM and Ctrl-C.
set -uo pipefail

name=$3 ip=$4 port=$5 ttl=${6:-10}
key=registry/$2/$3
etcdctl=${ETCDCTL:-etcdctl}
export ETCDCTL_API=3 ETCDCTL_ENDPOINTS=$1
state=serving lease='' leaving=''

# Always with the lease: an entry without one stays for ever.
publish() {
    local load
    load=$(cut -d ' ' -f 1 /proc/loadavg)
    printf '{"id":"%s","ip":"%s","port":%s,"last_seen":%s,"state":"%s"%s,"metadata":{"queue_depth":%s}}' \
        "$name" "$ip" "$port" "$(date +%s%3N)" "$state" "$leaving" "$load" |
        "$etcdctl" put --lease="$lease" "$key" >/dev/null
}

leave() {
    if [ -n "$lease" ]; then
        state=draining leaving=',"leaving":true'
        publish
        "$etcdctl" lease revoke "$lease" >/dev/null
    fi
    exit 0
}

trap 'state=draining' USR1
trap leave TERM INT

published=
while true; do
    if [ -z "$lease" ]; then
        lease=$("$etcdctl" lease grant "$ttl" | awk '{print $2}')
        published=
    else
        # Once, and not in a process of its own, which would keep the entry alive if this one is killed.
        answer=$("$etcdctl" lease keep-alive --once "$lease" 2>&1)
        if [[ $answer == *"expired or revoked"* || $answer == *"lease not found"* ]]; then
            lease=
            continue
        fi
    fi
    # At once after a change of state, otherwise every 5 s.
    if [ -n "$lease" ] && { [ "${published%% *}" != "$state" ] || [ $((SECONDS - ${published##* })) -ge 5 ]; }; then
        publish && published="$state $SECONDS"
    fi
    # A signal ends the wait.
    sleep 1 &
    wait $!
done
