#!/bin/sh
# Installs EdgeFlame as services, upgrades it, rolls it back, removes it; see docs/deploy.md. Running it again changes
# nothing that is as it should be.
#
#   /opt/edgeflame/releases/STAMP   a virtual environment for each release; `current` is the one that runs
#   /opt/edgeflame/edgeflame        runs it; /usr/local/bin/edgeflame is a link to this
#   /usr/local/lib/systemd/system   the units; your changes belong into /etc/systemd/system (systemctl edit)
#   /etc/edgeflame                  configuration and kits; never overwritten
#   /var/lib/edgeflame              state; never touched
set -eu
umask 022

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=deploy/roles.sh
. "$here/roles.sh"

UNITS="edgeflame-aggregate.service edgeflame-train@.service edgeflame-train@.timer edgeflame-inspect@.service"
KEPT_RELEASES=2 # beside the current one

usage() {
    cat <<'END'
usage: install.sh [options] [ROLE...]      install or upgrade; ROLE: aggregator, site, line; by default those of the
                                           last time
       install.sh [options] --rollback     back to the release before
       install.sh [options] --uninstall [--purge]

  --wheelhouse DIR         take everything from this folder of wheelhouse.sh; nothing is fetched
  --package SPEC           what to install: edgeflame==X.Y.Z or a wheel
                           [default: the wheelhouse's, else the newest edgeflame of the package index]
  --gpu                    models run on an NVIDIA GPU (onnxruntime-gpu)
  --with REQUIREMENT       a package more that the machine needs; may be given again
  --unlocked               the newest of everything that fits, in place of what the locks name with its hashes
                           (locks/, or those of the wheelhouse)
  --python PYTHON          of which Python; 3.10 or later  [default: python3]
  --system-site-packages   also see the system's Python packages (TensorRT and OpenCV of a Jetson)
  --root DIR               install below this folder (an image being made); starts and asks nothing of systemd
  --dry-run                say what would be done
  --uninstall              remove the program and its units; configuration, state and account stay
  --purge                  with --uninstall: remove those too; kits, results and models are gone then
END
}

say() { echo "install.sh: $1"; }
fail() {
    echo "install.sh: $1" >&2
    exit "${2:-1}"
}
# Carries a command out, or with --dry-run prints it.
run() {
    if [ "$dry" = 1 ]; then
        echo "would run: $*"
    else
        "$@"
    fi
}

root="" dry=0 action=install purge=0 wheelhouse="" package="" runtime=cpu python=python3 site_packages="" roles="" more="" locked=1
while [ $# -gt 0 ]; do
    case $1 in
        --wheelhouse | --package | --with | --python | --root) [ $# -ge 2 ] || fail "$1 needs a value; see --help" 2 ;;
    esac
    case $1 in
        --wheelhouse) wheelhouse=$2; shift ;;
        --package) package=$2; shift ;;
        --with) more="$more $2"; shift ;;
        --gpu) runtime=gpu ;;
        --unlocked) locked=0 ;;
        --python) python=$2; shift ;;
        --system-site-packages) site_packages=--system-site-packages ;;
        --root) root=${2%/}; shift ;;
        --dry-run) dry=1 ;;
        --rollback) action=rollback ;;
        --uninstall) action=uninstall ;;
        --purge) purge=1 ;;
        -h | --help) usage; exit 0 ;;
        -*) fail "unknown option $1; see --help" 2 ;;
        *) roles="$roles $1" ;;
    esac
    shift
done
[ "$action" = install ] || [ -z "$roles" ] || fail "--$action takes no role" 2
[ "$purge" = 0 ] || [ "$action" = uninstall ] || fail "--purge belongs to --uninstall" 2

opt=$root/opt/edgeflame
etc=$root/etc/edgeflame
units=$root/usr/local/lib/systemd/system
[ -n "$root" ] || [ "$dry" = 1 ] || [ "$(id -u)" = 0 ] || fail "run it as root, or with --root DIR"
# Only a system that systemd runs, and not one that is being put together, can be told to do something.
live=0
if [ -z "$root" ] && [ -d /run/systemd/system ]; then live=1; fi

switch_to() { # the link changes in one step: at no moment is there no current release
    run ln -sfn "releases/$1" "$opt/.current"
    run mv -T "$opt/.current" "$opt/current"
}

releases() { # oldest first; names are times
    find "$opt/releases" -mindepth 1 -maxdepth 1 -type d -name '[0-9]*' 2>/dev/null | sort | while read -r found; do
        basename "$found"
    done
}

# The roles, or those of the last time; and what was given with them, so that an upgrade loses nothing.
settle_roles() {
    if [ -z "$roles" ]; then
        [ -f "$opt/roles" ] || fail "no role given: aggregator, site or line; see --help" 2
        { read -r runtime roles && read -r more && read -r site_packages; } <"$opt/roles"
    fi
    # shellcheck disable=SC2086 # words of a list
    extras=$(join_extras "$runtime" $roles) || exit 2
}

restart_advice() {
    say "services that run go on with the release they were started from; when it suits you:"
    say "  systemctl restart 'edgeflame-*'"
}

# Which locks hold: those of the roles, beside the wheels or beside this script. A wheelhouse without any (of --unlocked,
# or of an earlier release) is as its SHA256SUMS says.
find_locks() {
    locks=$here/locks
    if [ -n "$wheelhouse" ]; then
        locks=$wheelhouse/locks
        [ -d "$locks" ] || locked=0
    fi
    [ "$locked" = 1 ] || return 0
    for role in $roles; do
        [ -f "$locks/$(lock_of "$role" "$runtime")" ] ||
            fail "$locks has no $(lock_of "$role" "$runtime"): make the wheelhouse for the role $role as well"
    done
}

pip_of() { # pip of a new release, whatever the variables of this shell say
    new_python=$1/bin/python
    shift
    env -u PYTHONPATH -u PYTHONHOME "$new_python" -m pip "$@"
}

# install_packages NEW PIP-OPTIONS...: all of it into an environment.
install_packages() {
    into=$1
    shift
    if [ "$locked" = 0 ]; then
        # shellcheck disable=SC2086 # words of a list
        pip_of "$into" install --quiet "$@" "${package:-edgeflame}[$extras]" $more ||
            fail "pip could not install it; the release that was current still is"
        return
    fi
    for role in $roles; do cat "$locks/$(lock_of "$role" "$runtime")"; done >"$into/locked.txt"
    pip_of "$into" install --quiet "$@" --no-deps --only-binary :all: --require-hashes -r "$into/locked.txt" ||
        fail "pip could not install what $locks says; the release that was current still is"
    pip_of "$into" install --quiet "$@" --no-deps "${package:-edgeflame}" ||
        fail "pip could not install it; the release that was current still is"
    # shellcheck disable=SC2086 # words of a list
    [ -z "$more" ] || pip_of "$into" install --quiet "$@" $more ||
        fail "pip could not install$more; the release that was current still is"
    # Nothing is fetched any more; it fails where something is missing, or is of a version that does not fit.
    pip_of "$into" --isolated install --quiet --disable-pip-version-check --no-index "edgeflame[$extras]" ||
        fail "the locks of $locks are not those of this edgeflame: take both from one release, or --unlocked"
}

install_release() {
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "$python is not Python 3.10 or later with venv: apt install python3-venv, or name another with --python"
    set -- --disable-pip-version-check --no-input
    if [ -n "$wheelhouse" ]; then
        [ -d "$wheelhouse" ] || fail "$wheelhouse: no such folder; wheelhouse.sh makes one"
        wheelhouse=$(readlink -f "$wheelhouse")
        if [ -f "$wheelhouse/SHA256SUMS" ]; then
            (cd "$wheelhouse" && sha256sum --quiet --strict --check SHA256SUMS) ||
                fail "$wheelhouse is damaged: carry it over again"
        fi
        # Isolated: no variable and no pip.conf of this machine brings in another index.
        set -- --isolated "$@" --no-index --find-links "$wheelhouse"
    fi
    find_locks
    release=$(date -u +%Y%m%dT%H%M%SZ)
    if [ "$dry" = 1 ]; then
        # shellcheck disable=SC2086 # one option or none
        run "$python" -m venv $site_packages "$opt/releases/$release"
        if [ "$locked" = 1 ]; then
            for role in $roles; do set -- "$@" --require-hashes -r "$locks/$(lock_of "$role" "$runtime")"; done
        fi
        # shellcheck disable=SC2086 # words of a list
        run "$opt/releases/$release/bin/python" -m pip install "$@" "${package:-edgeflame}[$extras]" $more
        switch_to "$release"
        return
    fi
    mkdir -p "$opt/releases"
    new=$opt/releases/$release
    [ ! -e "$new" ] || fail "$new is there already: another install.sh runs"
    # shellcheck disable=SC2064 # now, while the name is known
    trap "rm -rf '$new'" EXIT
    trap 'exit 130' INT TERM
    # shellcheck disable=SC2086 # one option or none
    "$python" -m venv $site_packages "$new"
    install_packages "$new" "$@"
    # The system's own packages are not ours to judge, where they are seen.
    [ -n "$site_packages" ] || env -u PYTHONPATH "$new/bin/python" -I -m pip check >/dev/null ||
        fail "the packages do not fit together"
    found=$(env -u PYTHONPATH "$new/bin/python" -I -m edgeflame --version) || fail "the new release does not start"
    if [ -e "$opt/current" ] && [ "$(contents "$opt/current")" = "$(contents "$new")" ]; then
        say "$found is installed already, with the same packages"
        rm -rf "$new"
        trap - EXIT
        return
    fi
    switch_to "$release"
    trap - EXIT
    say "$found is current"
    releases | head -n "-$((KEPT_RELEASES + 1))" | while read -r old; do
        if grep -qs "/releases/$old/" /proc/[0-9]*/cmdline; then
            say "release $old still runs, so it stays"
        else
            rm -rf "${opt:?}/releases/$old"
        fi
    done
}

contents() { # what a release consists of; our own files by their hashes, for a version may be built twice
    grep '^include-system-site-packages' "$1/pyvenv.cfg"
    find "$(readlink -f "$1")" -path '*/edgeflame-*.dist-info/RECORD' -exec grep -v '^\.\./' {} + | sort | sha256sum
    "$1/bin/python" -I --version
    "$1/bin/python" -I -m pip freeze --disable-pip-version-check | sort
}

install_files() {
    run install -D -m 755 "$here/launcher.sh" "$opt/edgeflame"
    # shellcheck disable=SC2086 # words of a list
    [ "$dry" = 1 ] || printf '%s\n' "$runtime $roles" "$more" "$site_packages" >"$opt/roles"
    run mkdir -p "$root/usr/local/bin"
    run ln -sfn /opt/edgeflame/edgeflame "$root/usr/local/bin/edgeflame"
    for unit in $UNITS; do
        run install -D -m 644 "$here/systemd/$unit" "$units/$unit"
    done
    run install -D -m 644 "$here/systemd/edgeflame.sysusers.conf" "$root/usr/local/lib/sysusers.d/edgeflame.conf"
    for folder in lines sites examples; do
        run install -d -m 755 "$etc/$folder"
    done
    for example in "$here"/examples/*; do
        run install -m 644 "$example" "$etc/examples/"
    done
    if [ "$live" = 1 ]; then
        run systemd-sysusers "$root/usr/local/lib/sysusers.d/edgeflame.conf"
        run systemctl daemon-reload
    fi
}

rollback() {
    current=$(basename "$(readlink "$opt/current" 2>/dev/null)" 2>/dev/null) || current=""
    [ -n "$current" ] || fail "nothing is installed in $opt"
    before=$(releases | awk -v current="$current" '$0 < current { last = $0 } END { print last }')
    [ -n "$before" ] || fail "there is no release before $current"
    switch_to "$before"
    say "release $before is current again"
    [ "$live" = 0 ] || restart_advice
}

uninstall() {
    if [ "$live" = 1 ]; then
        run systemctl stop 'edgeflame-*'
        systemctl list-unit-files --no-legend 'edgeflame-*' | awk '$2 == "enabled" { print $1 }' |
            while read -r unit; do run systemctl disable "$unit"; done
        for unit in /etc/systemd/system/*.wants/edgeflame-*@*; do
            [ ! -L "$unit" ] || run rm "$unit"
        done
    fi
    for unit in $UNITS; do
        run rm -f "$units/$unit"
    done
    run rm -f "$root/usr/local/lib/sysusers.d/edgeflame.conf" "$root/usr/local/bin/edgeflame"
    run rm -rf "$opt"
    [ "$live" = 0 ] || run systemctl daemon-reload
    if [ "$purge" = 0 ]; then
        say "kept: $etc, $root/var/lib/edgeflame and the account edgeflame (--purge removes them)"
        return
    fi
    run rm -rf "$etc" "$root/var/lib/edgeflame" "$root/var/cache/edgeflame"
    if [ "$live" = 1 ] && getent passwd edgeflame >/dev/null; then run userdel edgeflame; fi
}

case $action in
    install)
        settle_roles
        install_release
        install_files
        [ "$live" = 0 ] || restart_advice
        ;;
    rollback) rollback ;;
    uninstall) uninstall ;;
esac
