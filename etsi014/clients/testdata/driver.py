"""Uses quietline014.py as a module, step by step for TestAsModule."""

import importlib.util
import json
import sys
import threading

setup = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("quietline014", setup["module"])
quietline014 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quietline014)


def client(flags):
    return quietline014.Client([setup["url"]], cert=flags[1], key=flags[3], ca=flags[5])


def say(text):
    print(text, flush=True)


tokyo, kochi = client(setup["tokyo"]), client(setup["kochi"])
for _ in range(3):
    tokyo.status(setup["kochiID"])
keys = tokyo.enc(setup["kochiID"])
same = kochi.dec(setup["tokyoID"], [keys[0].id])
assert keys[0].bits == same[0].bits
try:
    kochi.dec(setup["tokyoID"], keys[0].id)
    raise SystemExit("collected twice")
except quietline014.UnknownKey as e:
    assert e.code == 400 and not e.lost, e
say(keys[0].bits.hex())
say(repr(keys) + str(keys[0]) + "%s %r" % (keys[0], keys[0]) + repr(vars(tokyo)))
held = keys[0].bits
first = keys[0]
with keys:
    pass
say("wiped" if not held and not first.bits and not keys else "still there")
sys.stdin.readline()
say("drawn" if len(tokyo.enc(setup["kochiID"])) == 1 else "nothing")

ids, lock = set(), threading.Lock()


def draw():
    for k in tokyo.enc(setup["kochiID"], number=4):
        with lock:
            ids.add(k.id)


threads = [threading.Thread(target=draw) for _ in range(5)]
for t in threads:
    t.start()
for t in threads:
    t.join()
say("many threads: %d keys, all different" % len(ids))
