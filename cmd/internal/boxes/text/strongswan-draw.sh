#!/bin/sh
# Draws a key for "{{.Peer}}", loads it as PPK and prints its key_ID for
# collect.sh at the other end. QUIETLINE, SWANCTL, PPK_ID and PPK_FILE may be
# set otherwise.
set -eu
umask 077
line=$("${QUIETLINE:-quietline}" client enc --url '{{.URL}}' --peer '{{.Peer}}' \
    --cert '{{.Dir}}/sae.crt' --key '{{.Dir}}/sae.key' --ca '{{.Dir}}/kme-ca.crt' \
    --number 1 --size 256)
file=${PPK_FILE:-/etc/swanctl/conf.d/quietline-ppk.conf}
printf 'secrets {\n    ppk-quietline {\n        id = %s\n        secret = 0s%s\n    }\n}\n' \
    "${PPK_ID:-quietline}" "${line#* }" > "$file.next"
mv "$file.next" "$file"
"${SWANCTL:-swanctl}" --load-creds > /dev/null
echo "${line%% *}"
