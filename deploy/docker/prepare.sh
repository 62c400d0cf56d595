#!/bin/sh
# Makes what compose.yml mounts, in deploy/docker/data: a fleet with its kits, the broker's folder, a Grafana password,
# generated images. Needs edgeflame with the extra `fleet` here, or another program in EDGEFLAME. What is there stays.
set -eu

here=$(dirname "$(readlink -f "$0")")
data=$here/data
edgeflame=${EDGEFLAME:-edgeflame}
container_uid=10001
broker_uid=10002

mkdir -p "$data"
if [ ! -e "$data/fleet" ]; then
    $edgeflame fleet init "$data/fleet" --fleet boards --host broker --host localhost \
        --install-dir /etc/mosquitto/edgeflame --plugin /usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so
    for site in plant-a plant-b; do
        $edgeflame fleet enrol "$data/fleet" "$site" --offline
    done
    $edgeflame fleet enrol "$data/fleet" line-1 --role line --offline
fi
if [ ! -e "$data/broker" ]; then
    cp -r "$data/fleet/broker" "$data/broker"
fi
if [ ! -e "$data/secrets" ]; then
    mkdir -m 700 "$data/secrets"
    for member in aggregator plant-a plant-b line-1; do
        cp "$data/fleet/kits/$member.kit" "$data/secrets/"
    done
    (umask 077 && head -c 18 /dev/urandom | base64 >"$data/secrets/grafana-password")
fi
if [ ! -e "$data/images" ]; then
    $edgeflame demo-data --sites 2 --out "$data/images" "$@"
fi
# Containers see files with their owner's number; the secrets stay unreadable for everybody else.
if [ "$(id -u)" = 0 ]; then
    chown -R "$broker_uid" "$data/broker"
    chown "$container_uid" "$data"/secrets/*.kit
    chown 472 "$data/secrets/grafana-password" # Grafana's user in its image
    chmod 711 "$data/secrets"
    chmod -R a+rX "$data/images"
else
    echo "prepare.sh: run it as root once more: files in $data have to belong to the containers' users" >&2
    exit 1
fi
echo "prepare.sh: ready; Grafana's user is admin, its password is in $data/secrets/grafana-password"
