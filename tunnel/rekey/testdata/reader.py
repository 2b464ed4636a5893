"""Follows the handshake vectors in docs/vectors with nothing but Python's
standard library: ML-KEM, X25519, P-384, AES-GCM and HPKE's export are written
here from FIPS 203, RFC 7748, SEC 1, SP 800-38D and RFC 9180. It shares no code
with the Go machine; if both find the same keys, the format is what it says.

    python3 reader.py [--faults] FILE...

It is slow, leaks timing and is for tests only.
"""
import hashlib
import hmac
import json
import sys
from functools import lru_cache

# ---- ML-KEM, FIPS 203

Q = 3329


def bitrev7(i):
    return int(f"{i:07b}"[::-1], 2)


ZETA = [pow(17, bitrev7(i), Q) for i in range(128)]
GAMMA = [pow(17, 2 * bitrev7(i) + 1, Q) for i in range(128)]


def ntt(f):
    f, i, n = f[:], 1, 128
    while n >= 2:
        for start in range(0, 256, 2 * n):
            z = ZETA[i]
            i += 1
            for j in range(start, start + n):
                t = z * f[j + n] % Q
                f[j + n], f[j] = (f[j] - t) % Q, (f[j] + t) % Q
        n //= 2
    return f


def inverse_ntt(f):
    f, i, n = f[:], 127, 2
    while n <= 128:
        for start in range(0, 256, 2 * n):
            z = ZETA[i]
            i -= 1
            for j in range(start, start + n):
                t = f[j]
                f[j], f[j + n] = (t + f[j + n]) % Q, z * (f[j + n] - t) % Q
        n *= 2
    return [x * 3303 % Q for x in f]


def multiply(a, b):
    c = []
    for i in range(128):
        a0, a1, b0, b1 = a[2 * i], a[2 * i + 1], b[2 * i], b[2 * i + 1]
        c += [(a0 * b0 + a1 * b1 * GAMMA[i]) % Q, (a0 * b1 + a1 * b0) % Q]
    return c


def add(a, b):
    return [(x + y) % Q for x, y in zip(a, b)]


def dot(a, b):
    total = [0] * 256
    for x, y in zip(a, b):
        total = add(total, multiply(x, y))
    return total


def sample_ntt(seed):
    stream, out, at = hashlib.shake_128(seed).digest(4 * 504), [], 0
    while len(out) < 256:
        a, b, c = stream[at:at + 3]
        at += 3
        for d in (a + 256 * (b % 16), b // 16 + 16 * c):
            if d < Q and len(out) < 256:
                out.append(d)
    return out


def cbd2(b):
    bits = [x >> i & 1 for x in b for i in range(8)]
    return [(bits[4 * i] + bits[4 * i + 1] - bits[4 * i + 2] - bits[4 * i + 3]) % Q
            for i in range(256)]


def encode(d, f):
    n = 0
    for i, x in enumerate(f):
        n |= x << (d * i)
    return n.to_bytes(32 * d, "little")


def decode(d, b):
    n, mask = int.from_bytes(b, "little"), (1 << d) - 1
    return [n >> (d * i) & mask for i in range(256)]


def compress(d, f):
    return [((x << d) + Q // 2) // Q % (1 << d) for x in f]


def decompress(d, f):
    return [(x * Q + (1 << (d - 1))) >> d for x in f]


class MLKEM:
    """One key pair; k, du, dv as in table 2 of FIPS 203, eta1 = eta2 = 2."""

    def __init__(self, seed, k, du, dv):
        self.k, self.du, self.dv = k, du, dv
        d, self.z = seed[:32], seed[32:]
        g = hashlib.sha3_512(d + bytes([k])).digest()
        rho, sigma = g[:32], g[32:]
        self.a = [[sample_ntt(rho + bytes([j, i])) for j in range(k)] for i in range(k)]
        noise = [self.noise(sigma, i) for i in range(2 * k)]
        self.s = [ntt(x) for x in noise[:k]]
        e = [ntt(x) for x in noise[k:]]
        self.t = [add(dot(self.a[i], self.s), e[i]) for i in range(k)]
        self.public = b"".join(encode(12, x) for x in self.t) + rho

    def noise(self, seed, n):
        return cbd2(hashlib.shake_256(seed + bytes([n])).digest(128))

    def encrypt(self, m, r):
        k = self.k
        y = [ntt(self.noise(r, i)) for i in range(k)]
        u = [add(inverse_ntt(dot([self.a[j][i] for j in range(k)], y)), self.noise(r, k + i))
             for i in range(k)]
        v = add(add(inverse_ntt(dot(self.t, y)), self.noise(r, 2 * k)),
                decompress(1, decode(1, m)))
        return (b"".join(encode(self.du, compress(self.du, x)) for x in u)
                + encode(self.dv, compress(self.dv, v)))

    def decapsulate(self, c):
        n = 32 * self.du
        u = [decompress(self.du, decode(self.du, c[n * i:n * i + n])) for i in range(self.k)]
        v = decompress(self.dv, decode(self.dv, c[n * self.k:]))
        w = inverse_ntt(dot(self.s, [ntt(x) for x in u]))
        m = encode(1, compress(1, [(x - y) % Q for x, y in zip(v, w)]))
        g = hashlib.sha3_512(m + hashlib.sha3_256(self.public).digest()).digest()
        if self.encrypt(m, g[32:]) == c:
            return g[:32]
        return hashlib.shake_256(self.z + c).digest(32)


# ---- X25519, RFC 7748 section 5

P25519 = 2**255 - 19


def x25519(scalar, point):
    k = int.from_bytes(scalar, "little") & ~7 & (2**254 - 1) | 2**254
    x1 = int.from_bytes(point, "little") & (2**255 - 1)
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for t in reversed(range(255)):
        bit = k >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb, aa, bb = d * a, c * b, a * a, b * b
        e = aa - bb
        x3, z3 = (da + cb)**2 % P25519, x1 * (da - cb)**2 % P25519
        x2, z2 = aa * bb % P25519, e * (aa + 121665 * e) % P25519
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P25519 - 2, P25519) % P25519).to_bytes(32, "little")


# ---- P-384, SEC 2 section 2.5.1

P384 = 2**384 - 2**128 - 2**96 + 2**32 - 1
N384 = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf"
           "581a0db248b0a77aecec196accc52973", 16)
B384 = int("b3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875a"
           "c656398d8a2ed19d2a85c8edd3ec2aef", 16)
G384 = (int("aa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b9859f741e082542a38"
            "5502f25dbf55296c3a545e3872760ab7", 16),
        int("3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147ce9da3113b5f0b8c0"
            "0a60b1ce1d7e819d7a431d7c90ea0e5f", 16))


def point_add(a, b):
    if a is None:
        return b
    if b is None:
        return a
    if a[0] == b[0]:
        if (a[1] + b[1]) % P384 == 0:
            return None
        s = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, P384)
    else:
        s = (b[1] - a[1]) * pow(b[0] - a[0], -1, P384)
    x = (s * s - a[0] - b[0]) % P384
    return x, (s * (a[0] - x) - a[1]) % P384


def point_multiply(k, a):
    out = None
    while k:
        if k & 1:
            out = point_add(out, a)
        a, k = point_add(a, a), k >> 1
    return out


def point_bytes(a):
    return b"\4" + a[0].to_bytes(48, "big") + a[1].to_bytes(48, "big")


def point_parse(b):
    x, y = int.from_bytes(b[1:49], "big"), int.from_bytes(b[49:], "big")
    if b[0] != 4 or x >= P384 or y >= P384 or (y * y - x**3 + 3 * x - B384) % P384:
        raise ValueError("no point of the curve")
    return x, y


# ---- HMAC, HKDF (RFC 5869)

def mac(name, key, data):
    return hmac.new(key, data, name).digest()


def extract(salt, ikm):
    return mac("sha384", salt or bytes(48), ikm)


def expand(prk, info, n, name="sha384"):
    out, block, i = b"", b"", 0
    while len(out) < n:
        i += 1
        block = mac(name, prk, block + info + bytes([i]))
        out += block
    return out[:n]


# ---- the two suites

class XWing:
    """draft-connolly-cfrg-xwing-kem section 5"""
    public_size, ct_size = 1216, 1120

    def __init__(self, seed):
        b = hashlib.shake_256(seed).digest(96)
        self.m, self.x = MLKEM(b[:64], 3, 10, 4), b[64:]
        self.pk = x25519(self.x, (9).to_bytes(32, "little"))
        self.public = self.m.public + self.pk

    @lru_cache(maxsize=None)
    def decapsulate(self, c):
        ct = c[1088:]
        return hashlib.sha3_256(self.m.decapsulate(c[:1088]) + x25519(self.x, ct) + ct + self.pk
                                + b"\\.//^\\").digest()


class MLKEM1024P384:
    """draft-ietf-hpke-pq, through the export of RFC 9180 section 5.3"""
    public_size = ct_size = 1665

    def __init__(self, seed):
        b = hashlib.shake_256(seed).digest(64 + 48 * 8)
        self.m, at = MLKEM(b[:64], 4, 11, 5), 64
        while not 0 < (k := int.from_bytes(b[at:at + 48], "big")) < N384:
            at += 48
        self.k = k
        self.pk = point_bytes(point_multiply(k, G384))
        self.public = self.m.public + self.pk

    @lru_cache(maxsize=None)
    def decapsulate(self, c):
        ct = c[1568:]
        shared = point_multiply(self.k, point_parse(ct))[0].to_bytes(48, "big")
        ss = hashlib.sha3_256(self.m.decapsulate(c[:1568]) + shared + ct + self.pk
                              + b"MLKEM1024-P384").digest()
        suite = b"HPKE" + bytes([0, 0x51, 0, 2, 0xff, 0xff])

        def lextract(salt, label, ikm):
            return extract(salt, b"HPKE-v1" + suite + label + ikm)

        def lexpand(prk, label, info):
            return expand(prk, bytes([0, 48]) + b"HPKE-v1" + suite + label + info, 48)

        context = b"\0" + lextract(b"", b"psk_id_hash", b"") + lextract(b"", b"info_hash",
                                                                      b"QLE1 KEM")
        exporter = lexpand(lextract(ss, b"secret", b""), b"exp", context)
        return lexpand(exporter, b"sec", b"shared secret")


# ---- AES-256-GCM, FIPS 197 and SP 800-38D

def make_sbox():
    box, p, q = [0] * 256, 1, 1
    while True:
        p = p ^ (p << 1) & 255 ^ (0x1b if p & 128 else 0)
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 255
        if q & 128:
            q ^= 9
        x = q
        for i in range(1, 5):
            x ^= (q << i | q >> (8 - i)) & 255
        box[p] = x ^ 0x63
        if p == 1:
            box[0] = 0x63
            return box


SBOX = make_sbox()


def xtime(a):
    return (a << 1 ^ (0x1b if a & 128 else 0)) & 255


def round_keys(key):
    w, rcon = [list(key[i:i + 4]) for i in range(0, 32, 4)], 1
    for i in range(8, 60):
        t = w[i - 1][:]
        if i % 8 == 0:
            t = [SBOX[b] for b in t[1:] + t[:1]]
            t[0] ^= rcon
            rcon = xtime(rcon)
        elif i % 8 == 4:
            t = [SBOX[b] for b in t]
        w.append([a ^ b for a, b in zip(w[i - 8], t)])
    return [sum(w[i:i + 4], []) for i in range(0, 60, 4)]


def aes(keys, block):
    s = [a ^ b for a, b in zip(block, keys[0])]
    for n in range(1, 15):
        s = [SBOX[s[(i + 4 * (i % 4)) % 16]] for i in range(16)]
        if n < 14:
            t = []
            for c in range(0, 16, 4):
                a = s[c:c + 4]
                x = a[0] ^ a[1] ^ a[2] ^ a[3]
                t += [a[i] ^ x ^ xtime(a[i] ^ a[(i + 1) % 4]) for i in range(4)]
            s = t
        s = [a ^ b for a, b in zip(s, keys[n])]
    return bytes(s)


def gf_multiply(x, y):
    z = 0
    for i in range(128):
        if x >> (127 - i) & 1:
            z ^= y
        y = y >> 1 ^ (0xe1 << 120 if y & 1 else 0)
    return z


def gcm_open(key, aad, box):
    keys = round_keys(key)
    h, ct, tag = int.from_bytes(aes(keys, bytes(16)), "big"), box[:-16], box[-16:]

    def pad(b):
        return b + bytes(-len(b) % 16)

    data = pad(aad) + pad(ct) + (8 * len(aad)).to_bytes(8, "big") + (8 * len(ct)).to_bytes(8, "big")
    y = 0
    for i in range(0, len(data), 16):
        y = gf_multiply(y ^ int.from_bytes(data[i:i + 16], "big"), h)
    stream = b"".join(aes(keys, bytes(12) + (1 + i).to_bytes(4, "big"))
                      for i in range(2 + len(ct) // 16))
    want = bytes(a ^ b for a, b in zip(y.to_bytes(16, "big"), stream))
    if want != tag:
        return None
    return bytes(a ^ b for a, b in zip(ct, stream[16:]))


# ---- the handshake

class Stop(Exception):
    pass


def sha384(b):
    return hashlib.sha384(b).digest()


def length(b):
    return len(b).to_bytes(8, "big")


@lru_cache(maxsize=None)
def key_pair(suite, seed):
    return {1: XWing, 2: MLKEM1024P384}[suite](bytes.fromhex(seed))


class Reader:
    def __init__(self, v, fault=None):
        self.v, self.fault, self.suite = v, fault, v["Suite"]
        self.i, self.r, self.e = (key_pair(self.suite, v[s]) for s in ("SeedI", "SeedR", "SeedE"))
        parts = [b"QLE1", bytes([self.suite]), bytes.fromhex(v["LinkID"]), self.i.public,
                 self.r.public]
        self.h = sha384(b"".join(length(p) + p for p in parts))
        self.ck = sha384(v["Protocol"].encode())

    def mix_hash(self, x):
        self.h = sha384(self.h + length(x) + x)

    def mix_key(self, label, s):
        self.ck = expand(extract(self.ck, s), b"QLE1 ck " + label.encode() + self.h, 48)

    def derive(self, label, n):
        return expand(self.ck, b"QLE1 " + label.encode() + self.h, n)

    def open(self, label, box, m):
        plain = gcm_open(self.derive("k " + label, 32), self.h, box)
        if plain is None:
            raise Stop(label)
        if plain != bytes.fromhex(m["Plain"]):
            raise Stop("plaintext of " + label)
        self.mix_hash(box)

    def payload(self, n, m):
        sender_is_i = m["From"] == "I"
        receiver = self.r if sender_is_i else self.i
        info = b"QLE1 mac1" + bytes([0 if sender_is_i else 1]) + sha384(receiver.public)
        prk = mac("sha256", bytes(32), bytes.fromhex(self.v["LinkSecret"]))
        key, out = expand(prk, info, 32, "sha256"), b""
        for text in m["Datagrams"]:
            d = bytes.fromhex(text)
            if mac("sha256", key, d[:-32])[:16] != d[-32:-16]:
                raise Stop("mac1")
            out += d[16:-32]
        if self.fault and self.fault["Message"] == n:
            out = bytearray(out)
            out[self.fault["Offset"]] ^= 1 << self.fault["Bit"]
        return bytes(out)

    def take(self, b, *sizes):
        fields = []
        for n in sizes:
            fields.append(b[:n])
            self.mix_hash(b[:n])
            b = b[n:]
        return fields + [b]

    def decapsulate(self, label, pair, ct):
        try:
            self.mix_key(label, pair.decapsulate(ct))
        except ValueError:
            raise Stop(label) from None

    def follow(self):
        v, ct, first = self.v, self.i.ct_size, True
        for n, m in enumerate(v["Messages"]):
            b = self.payload(n, m)
            if m["Kind"] == 1:
                _, idx_i, _, ct_r, box = self.take(b, 32, 4, self.i.public_size, ct)
                self.mix_key("psk", bytes.fromhex(v["LinkSecret"]))
                self.decapsulate("ss_R", self.r, ct_r)
                self.open("c1", box, m)
            elif m["Kind"] == 2:
                _, idx_r, ct_e, ct_i, box = self.take(b, 32, 4, ct, ct)
                self.decapsulate("ss_E", self.e, ct_e)
                self.decapsulate("ss_I", self.i, ct_i)
                self.open("c2", box, m)
            elif m["Kind"] == 3:
                self.mix_hash(idx_r)
                if first:
                    self.mix_key("rk" if v["Chain"] else "rk reset", bytes.fromhex(v["Chain"]))
                    first = False
                self.open("c3", b, m)
                keys, mode = m["QKD"] or [], m["Mode"]
            else:
                if not m["Refuses"]:
                    for i, k in enumerate(keys):
                        self.mix_key(f"qkd {i + 1}", bytes.fromhex(k["Key"]))
                    if not keys:
                        self.mix_key(f"noqkd {mode}", b"")
                self.mix_hash(idx_i)
                self.open("c4 error" if m["Refuses"] else "c4", b, m)
        for label, n, name in (("key I to R ", 32, "KeyIR"), ("iv I to R ", 12, "IVIR"),
                               ("key R to I ", 32, "KeyRI"), ("iv R to I ", 12, "IVRI"),
                               ("rk ", 48, "NextChain"), ("rk id ", 16, "NextChainID")):
            if self.derive(label, n).hex() != v["Out"][name]:
                raise Stop(name)


def main(args):
    faults, bad = "--faults" in args, 0
    for path in args:
        if path.startswith("--"):
            continue
        with open(path, encoding="utf-8") as f:
            v = json.load(f)
        tries = [None] + (v["Faults"] if faults else [])
        for fault in tries:
            stop = None
            try:
                Reader(v, fault).follow()
            except Stop as s:
                stop = str(s)
            if stop != (fault["StopsAt"] if fault else None):
                bad += 1
                print(f"{v['Name']}: {fault['Field'] if fault else 'as it is'}: stops at {stop}")
        print(f"{v['Name']}: {len(tries)} tries")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
