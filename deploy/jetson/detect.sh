# shellcheck shell=sh
# What a Jetson runs, from the text of /etc/nv_tegra_release; read by install.sh.

# l4t_release TEXT: "36.4.3" of "# R36 (release), REVISION: 4.3, GCID: ..."; nothing for other text.
l4t_release() {
    printf '%s\n' "$1" |
        sed -n 's/^# R\([0-9][0-9]*\) (release), REVISION: \([0-9][0-9.]*\),.*/\1.\2/p' | head -n 1
}

# jetpack_of L4T: the major version of JetPack a release of L4T belongs to; 1 if EdgeFlame does not support it.
jetpack_of() {
    case $1 in
        36.*) echo 6 ;;
        38.*) echo 7 ;;
        *) return 1 ;;
    esac
}

# cuda_bindings_of JETPACK: which cuda-bindings fit its CUDA (12.2 to 12.6 in JetPack 6, 13.0 in JetPack 7).
cuda_bindings_of() {
    case $1 in
        6) echo "cuda-bindings>=12.6,<13" ;;
        7) echo "cuda-bindings>=13,<14" ;;
    esac
}
