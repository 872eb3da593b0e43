import time, statistics, sys
import jax, jax.numpy as jnp
from experiments.bench import ours
from experiments.bench.setting import Setting
from lowrank.adapt.rules import Rule, Train
from lowrank.deltas.lora import LoRA
from lowrank.io import hub
from lowrank.run.forward import inputs_of
from lowrank.train.losses import cross_entropy
from experiments.bench.ours import SITES
B,S=map(int,sys.argv[1].split("x"))
s=Setting(base="minilm",batch=B,seq=S); base=hub.load("minilm",num_classes=s.num_classes)
rules=[Train(base.head), Rule(SITES, LoRA(alpha=s.alpha), rank=s.rank)]
ad,tr,batch=ours.attached(s,base,rules)
fr=ad.frozen(); dials=ad.dials(); batch={k:jnp.asarray(v[0]) for k,v in batch.items()}
const={"label_smoothing":jnp.float32(0)}
def model(fr,tr,b,d): return ad.apply(fr,tr,inputs_of(b),dials=d,key=None)
def plain(tr,fr,b):
    def loss(tr):
        sums=cross_entropy(model(fr,tr,b,dials),b,const); return sums.loss/sums.weight
    return jax.value_and_grad(loss)(tr)
def joint(tr,fr,b):
    n=B
    gates={p:jnp.broadcast_to(d["gate"],(n,*d["gate"].shape)) for p,d in dials.items()}
    def loss(tr,gates):
        def one(g,row):
            own={p:{**dials[p],"gate":g[p]} for p in g}
            alone={k:x[None] for k,x in row.items()}
            sums=cross_entropy(model(fr,tr,alone,own),alone,const)
            return sums.loss,sums.weight
        l,w=jax.vmap(one)(gates,b)
        return l.sum()/w.sum()
    v,(g,gg)=jax.value_and_grad(loss,argnums=(0,1))(tr,gates)
    return v,g,jax.tree.map(lambda x:jnp.square(x).sum(0),gg)
def gates_only(tr,fr,b):
    return jax.value_and_grad(lambda t:0.0)(0.0)
fs={"plain":jax.jit(plain),"joint":jax.jit(joint)}
outs={k:jax.block_until_ready(f(tr,fr,batch)) for k,f in fs.items()}
a,b_=outs["plain"],outs["joint"]
err=max(float(jnp.abs(x-y).max()/(jnp.abs(x).max()+1e-12)) for x,y in zip(jax.tree.leaves(a[1]),jax.tree.leaves(b_[1])))
print("loss",a[0],b_[0],"grad rel err",err)
T={k:[] for k in fs}
for r in range(40):
    for k in (list(fs) if r%2 else list(fs)[::-1]):
        t=time.perf_counter()
        for _ in range(3 if B*S<1000 else 1): jax.block_until_ready(fs[k](tr,fr,batch))
        T[k].append((time.perf_counter()-t)/(3 if B*S<1000 else 1))
rat=sorted(j/p for j,p in zip(T["joint"],T["plain"]))
print(sys.argv[1],{k:round(statistics.median(v)*1e3,1) for k,v in T.items()},"ratio",round(statistics.median(rat),3),round(rat[10],3),round(rat[29],3))
