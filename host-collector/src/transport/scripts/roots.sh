# Whether root alone (or whoever runs this) can change what is at $1 itself. What is root's in a sticky folder nobody else moves.
is_roots() {
  [ ! -L "$1" ] || return 1
  set -- "$1" $(PATH=$PATH:/run/current-system/sw/bin ls -ldn "$1" 2>/dev/null)
  [ "$4" = 0 ] || [ -O "$1" ] || return 1
  case $2 in ?????-??-* | d????????[tT]*) ;; *) return 1 ;; esac
}

# Does $2 with each folder on the way to $1, from the top: what was found to be root's cannot become another's behind that.
each_folder() {
  at='' rest=${1%/*}/
  while [ -n "$rest" ]; do
    at=$at${rest%%/*} rest=${rest#*/}
    "$2" "${at:-/}" || return 1
    at=$at/
  done
}
