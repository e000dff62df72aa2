#!/bin/sh
# Builds acomm and installs it below DESTDIR and PREFIX, with its manual, completions,
# systemd units and sample configuration. Nothing outside of PREFIX is touched.
set -eu
cd "$(dirname "$0")"
prefix=${PREFIX:-/usr/local}
case $prefix in
*[!A-Za-z0-9/._+-]* | [!/]*)
	echo "PREFIX=$prefix is not an absolute path of plain characters" >&2
	exit 1
	;;
esac
to=${DESTDIR:-}$prefix

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd .. && ${GO:-go} build -o "$work/acomm" .)

# put MODE FILE PATH
put() {
	install -d "$to/$(dirname "$3")"
	install -m "$1" "$2" "$to/$3"
}

# generate PATH ARGUMENTS writes there what acomm with the arguments does.
generate() {
	path=$1
	shift
	"$work/acomm" "$@" >"$work/generated"
	put 644 "$work/generated" "$path"
}

put 755 "$work/acomm" bin/acomm
mkdir "$work/man"
"$work/acomm" man "$work/man"
for page in "$work"/man/*; do
	put 644 "$page" "share/man/man1/${page##*/}"
done
generate share/bash-completion/completions/acomm completion bash
generate share/zsh/site-functions/_acomm completion zsh
generate share/fish/vendor_completions.d/acomm.fish completion fish
for unit in acomm-gateway.service acomm-serve@.service; do
	sed "s|@bindir@|$prefix/bin|" "$unit.in" >"$work/$unit"
	put 644 "$work/$unit" "lib/systemd/system/$unit"
done
put 644 acomm.sysusers lib/sysusers.d/acomm.conf
put 644 gateway.yaml share/doc/acomm/gateway.yaml
put 644 serve.conf share/doc/acomm/serve.conf
