import sys, os, time, faulthandler
from jax._src.lib import _jax
role=int(sys.argv[1]); addr=sys.argv[2]; init=int(sys.argv[3])
svc=None
if role==0:
    svc=_jax.get_distributed_runtime_service(addr.replace("localhost","[::]"), 2, heartbeat_timeout=5, shutdown_timeout=5)
def cb(*a):
    print("CALLBACK", a, flush=True)
    os._exit(1)
c=_jax.get_distributed_runtime_client(addr, role, init_timeout=init, heartbeat_timeout=5, missed_heartbeat_callback=cb, use_compression=True)
try:
    c.connect()
except Exception as e:
    print("EXC", type(e), str(e)[:200], flush=True); sys.exit(3)
print("connected", flush=True)
while True: time.sleep(0.1)
