"""Opens the vectors of one-time pad in docs/vectors/pad: the datagram's AES-GCM
as ../../rekey/testdata/reader.py has it from SP 800-38D, Poly1305 from RFC 8439
section 2.5, the rest from docs/formats.md. It shares no code with Go.

    python3 reader.py FILE...

It leaks timing and is for tests only.
"""
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../rekey/testdata"))
from reader import aes, expand, gf_multiply, round_keys  # noqa: E402


class Stop(Exception):
    pass


def gcm_open(key, nonce, aad, box):
    keys = round_keys(key)
    text, tag = box[:-16], box[-16:]
    h = int.from_bytes(aes(keys, bytes(16)), "big")

    def pad(b):
        return b + bytes(-len(b) % 16)

    y = 0
    data = pad(aad) + pad(text) + (8 * len(aad)).to_bytes(8, "big") + (8 * len(text)).to_bytes(8, "big")
    for i in range(0, len(data), 16):
        y = gf_multiply(y ^ int.from_bytes(data[i:i + 16], "big"), h)
    mask = aes(keys, nonce + (1).to_bytes(4, "big"))
    if (y ^ int.from_bytes(mask, "big")).to_bytes(16, "big") != tag:
        raise Stop("outer")
    out = b""
    for i in range(0, len(text), 16):
        stream = aes(keys, nonce + (2 + i // 16).to_bytes(4, "big"))
        out += bytes(a ^ b for a, b in zip(text[i:i + 16], stream))
    return out


def poly1305(r, s, message):
    r = int.from_bytes(r, "little") & 0x0ffffffc0ffffffc0ffffffc0fffffff
    acc = 0
    for i in range(0, len(message), 16):
        acc = (acc + int.from_bytes(message[i:i + 16] + b"\1", "little")) * r % ((1 << 130) - 5)
    return ((acc + int.from_bytes(s, "little")) & ((1 << 128) - 1)).to_bytes(16, "little")


def block_of(v):
    keys = {k["KeyID"]: bytes.fromhex(k["Key"]) for k in v["Keys"]}
    bits, number = b"", 0
    for part, text in enumerate(v["Announce"]):
        b = bytes.fromhex(text)
        if b[0] != 16 or b[1] != len(v["Announce"]) or b[2] != part or len(b) != 28 + 16 * b[3]:
            raise Stop("announce")
        number = int.from_bytes(b[20:24], "big")
        for i in range(b[3]):
            key = keys[b[28 + 16 * i:44 + 16 * i].hex()]
            if len(key) != int.from_bytes(b[24:26], "big"):
                raise Stop("announce")
            bits += key
    first = bytes.fromhex(v["Announce"][0])
    ready = bytes.fromhex(v["Ready"])
    if ready[0] != 17 or ready[20:36] != first[4:20] or int.from_bytes(ready[36:], "big") != number:
        raise Stop("ready")
    return number, bits


def open_pad(p, number, bits):
    n = len(p) - 28
    at = int.from_bytes(p[8:12], "big")
    if n < 16 or n % 16 or p[0] != 4 or p[1] != 1 or p[2:4] != b"\0\0":
        raise Stop("form")
    if int.from_bytes(p[4:8], "big") != number:
        raise Stop("block")
    if at % 16 or at < 16 or at + n + 16 > len(bits):
        raise Stop("form")
    if poly1305(bits[:16], bits[at + n:at + n + 16], p[:12 + n]) != p[12 + n:]:
        raise Stop("tag")
    text = bytes(a ^ b for a, b in zip(p[12:12 + n], bits[at:at + n]))
    size = int.from_bytes(text[:2], "big")
    if size > n - 2 or any(text[2 + size:]):
        raise Stop("form")
    return text[2:2 + size]


def follow(v, fault=None):
    number, bits = block_of(v)
    key = expand(bytes.fromhex(v["OuterKey"]), b"QLE1 queue\0\1", 32)
    iv = bytes.fromhex(v["OuterIV"])
    for i, r in enumerate(v["Records"]):
        d = bytearray(bytes.fromhex(r["Datagram"]))
        mine = fault and fault["Record"] == i
        if mine and fault["Outer"]:
            d[fault["Offset"]] ^= 1 << fault["Bit"]
        if d[0] != 0x10 or d[1] != 0 or d[2:4] != b"\0\1" or int.from_bytes(d[4:8], "big") != v["Index"]:
            raise Stop("outer")
        nonce = iv[:4] + bytes(a ^ b for a, b in zip(iv[4:], d[8:16]))
        p = bytearray(gcm_open(key, nonce, bytes(d[:16]), bytes(d[16:])))
        if p.hex() != r["Pad"]:
            raise Stop("pad record")
        if mine and not fault["Outer"]:
            p[fault["Offset"]] ^= 1 << fault["Bit"]
        if open_pad(bytes(p), number, bits).hex() != r["Plain"]:
            raise Stop("plain")


def main(args):
    bad = 0
    for path in args:
        with open(path, encoding="utf-8") as f:
            v = json.load(f)
        for fault in [None] + v["Faults"]:
            stop = None
            try:
                follow(v, fault)
            except Stop as s:
                stop = str(s)
            if stop != (fault["StopsAt"] if fault else None):
                bad += 1
                print(f"{v['Name']}: {fault['Field'] if fault else 'as it is'}: stops at {stop}")
        print(f"{v['Name']}: {len(v['Faults']) + 1} tries")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
