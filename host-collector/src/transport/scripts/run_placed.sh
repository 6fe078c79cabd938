for place; do
  each_folder "$place" is_roots && is_roots "$place" && [ -f "$place" ] && [ -x "$place" ] && exec "$place" stream
done
exit 127
