# shellcheck shell=sh
# What a machine needs for what it is to be; read by install.sh and wheelhouse.sh.

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
