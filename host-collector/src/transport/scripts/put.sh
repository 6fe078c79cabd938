PATH=$PATH:/run/current-system/sw/bin
fail() { echo "$1" >&2; exit 1; }
make() {
  [ -e "$1" ] || [ -L "$1" ] || mkdir "$1" || exit 1
  [ -d "$1" ] && is_roots "$1" || fail "$1 is no folder that root alone can write to"
}
umask 022
each_folder "$1" make
folder=${1%/*}
if [ -d "$1" ]; then fail "$1 is a folder"; fi
rm -f "$folder"/.pika-guest.*
new=$folder/.pika-guest.$$
trap 'rm -f "$new"' EXIT
set -C
cat >"$new" || fail "$new could not be written"
size=$(wc -c <"$new")
[ "$size" -eq "$2" ] || fail "$size of $2 bytes came"
chmod 0755 "$new" || exit 1
said=$("$new" version 2>&1) || fail "it does not run there: $said"
mv -f "$new" "$1"
