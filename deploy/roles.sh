# shellcheck shell=sh
# What a machine needs for what it is to be; read by install.sh, wheelhouse.sh and requirements/deploy_locks.py.

# extras_of ROLE RUNTIME: the extras of a role; RUNTIME is cpu or gpu.
extras_of() {
    case $1 in
        aggregator) echo "fleet,memory,metrics,zstd" ;;
        site) echo "$2,train,metrics,sign,zstd" ;;
        line) echo "$2,web,plc,video,sign" ;;
        *)
            echo "expected a role: aggregator, site or line; got '$1'" >&2
            return 2
            ;;
    esac
}

# lock_of ROLE RUNTIME: the file of deploy/locks, or of a wheelhouse, that has all of it with hashes.
lock_of() {
    if [ "$2" = gpu ] && [ "$1" != aggregator ]; then echo "$1-gpu.txt"; else echo "$1.txt"; fi
}

# join_extras RUNTIME ROLE...: all their extras with commas between.
join_extras() {
    runtime=$1
    shift
    joined=""
    for role in "$@"; do
        extras=$(extras_of "$role" "$runtime") || return 2
        joined=${joined:+$joined,}$extras
    done
    echo "$joined"
}
