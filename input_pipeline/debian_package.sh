# This file is sourced. Its function fetches a package from Debian's mirror, without root.

# Unpacks a package into the working directory.
download_debian_package() {
    # (Root's apt would warn that its sandbox user cannot write here.)
    apt="apt-get --quiet=2 -o APT::Sandbox::User=root"
    # shellcheck disable=SC2086
    if ! $apt download "$1"; then
        # This machine has no package lists yet: fetch them to a place of our own.
        mkdir -p lists/partial cache/archives/partial
        own="-o Dir::State::Lists=$PWD/lists -o Dir::Cache=$PWD/cache"
        # shellcheck disable=SC2086
        $apt $own update && $apt $own download "$1" || return
    fi
    dpkg-deb --extract "$1"_*.deb .
}
