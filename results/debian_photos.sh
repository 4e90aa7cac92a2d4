#!/bin/sh
# Gets the photographs of debian_photos.csv from Debian's packages (160 MB), without root, into
# the folders train, validation and test of a directory.
#
#     results/debian_photos.sh DIRECTORY
set -eu
[ $# -eq 1 ] || { sed -n 's/^#  *results/usage: results/p' "$0" >&2 && exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
. "$here/../input_pipeline/debian_package.sh"

# Prints package, file, split and name of each photograph.
photos() { tail -n +2 "$here/debian_photos.csv" | cut -d, -f1-4 | tr , ' '; }

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
for package in $(photos | cut -d' ' -f1 | uniq); do
    (cd "$temporary" && download_debian_package "$package")
done
photos | while read -r _ file split name; do
    mkdir -p "$1/$split"
    cp "$temporary/$file" "$1/$split/$name.jpg"
done
