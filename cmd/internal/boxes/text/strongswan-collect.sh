#!/bin/sh
# Collects the key that "{{.Peer}}" drew, by the key_ID that its draw.sh
# printed, and loads it as PPK. QUIETLINE, SWANCTL, PPK_ID and PPK_FILE may be
# set otherwise.
set -eu
umask 077
line=$("${QUIETLINE:-quietline}" client dec --url '{{.URL}}' --peer '{{.Peer}}' \
    --cert '{{.Dir}}/sae.crt' --key '{{.Dir}}/sae.key' --ca '{{.Dir}}/kme-ca.crt' \
    --id "${1:?the key_ID is missing}")
file=${PPK_FILE:-/etc/swanctl/conf.d/quietline-ppk.conf}
printf 'secrets {\n    ppk-quietline {\n        id = %s\n        secret = 0s%s\n    }\n}\n' \
    "${PPK_ID:-quietline}" "${line#* }" > "$file.next"
mv "$file.next" "$file"
"${SWANCTL:-swanctl}" --load-creds > /dev/null
