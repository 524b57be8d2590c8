"""The codebooks of GGUF's IQ types: the vectors of 4 or 8 weights that an index stands for.

A vector is written in digits, one for each weight, each below `base`; a digit stands for an odd number in ggml's search
and for one of `levels` in a block. The vectors of a codebook are a set, and its order is that of the numbers whose
digits they are, the first digit the lowest. So a set of bits is all there is to keep:

    bit sum of digit[i] * base^i   set where the codebook has the vector

`_SETS` has them compressed. They are facts of the format, read from the tables of the package gguf, which
`tests/quant/test_codebooks.py` compares; ggml's author chose them by statistics that were not published.

ggml looks a vector of rounded digits up, and where the codebook does not have it, among its neighbours: the vectors at
the smallest, second and, for some types, third smallest distance. Source: llama.cpp's ggml-quants.c.
"""

import base64
import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitnet.quant.blocks.layout import Vectors, unpack_bits

_SETS = {
    "IQ2_XXS": (
        "c-nPRORB^$43oj#tB`je2YP^R=KfcCw)5@K5e=lV<VbEmf91ogR%p3E0BR^O#16P=^@J3)+t0mx___f>P^zDolEn6;is&dxI!#Zg_{KuzkVd"
        "4Mw`?l*l~*(z5~c8Qj-!-YZym34v`$TQ4<4*~)dpL;rq|+W4irx`d$&)6^vGb7UkLBrzcFbHqcf>sMFwRxr;MTG;*}m%Qlby-@@TSk)X7om@"
        "@#uKQIjUUWQ&$2&y}*gX5TV=Bc|Cuh1wL(2Kn3A3Yj<N%;gblzhT7_jxp@MF=lA5st5R^Hl2J=^JV`E{Z0D^#$6R7"
    ),
    "IQ2_XS": (
        "c-mc2TdsvL2pkgnkBRPwCicH3cK=&BJX-bM<{ZTW!^|+oxJIi-qkD|rsuaR~iB<*?x~C4>8J0pJW<V>X*vo#SY&(-c)w(<-fCU6QVt|)*=>o"
        "J=N8h~B3mmYKBw*Y)Ca<s*uvOak7T*la5<g=kAh?T96(5+bR(Mt@J=L5^n!u1sF+~=p=RjVCGbM+vDH*59tF!>kC`)-u3GzO}jM8X_r-*1yt"
        "ubG*&a^iqGs?p-do}D8x2NWXU?%O)=7t88q040RdJ=Ak)9T+$YBcFD31^6BC_W+mG1}iEA-T}Oj@u6-pQ1yByIl9%`W3mW#F%j~<yh(N0zSL"
        "~oH^Zy%}}tQx4=M73#xoc?jNErTmD?iDs40;(&MG>YYMNuDE=SK;cc#9vM%q_=>7msuqjC"
    ),
    "IQ2_S": (
        "c-n1JU5W-F3~NE(E9iYHjPDBe{#V(wI=kPpE5rQ7#3X8F%Z9aF@G^(h-0EI3Em0|W3^QwctZ7zp0a8G#rYWS&oF&YfEj@sgh^u5FBBgC>LAk"
        "BEEtarKv-X}c)kMD5E9g)N*35uFS6j&;COQ!QC2=T0oAzp}=fs8f?3xctXeG?g^dQAA!2(KVP=j1x!<Qgx@l7F)Pu!TMd$m>{ZzEray(N$Az"
        "Rb24)#*U9zYZZF^+2!@EVQ9?ARiEH!J<ErE8usn4?()-BQhW*1pE<<S|Z6aT82aQO}QP4+el6zUY~*z7~Sl6pK?p!Q_DMIhH4w7?joIO9P^#"
        "Dw9CRS7mu8OBC|vDii4FoWN_zK9m?6y$}qXC*pyH_2f!)+bXep&HXz~CYasM7Fd3(JhmM~KIbkHJ7yU4;E692~{FNElHOf~Fzm+TBn!W(Jyj"
        "C6"
    ),
    "IQ3_XXS": (
        "c-l=-F%H5o3_M%0RAmZ7_lgPeigaLyA4Q!IuVCbv_?)J2Rn;aw-<^~BWtxCXwzFx0%xW)eST<YW5KL&L;j#hAAHoX-c)&}FY<X@1m|7IGsjr"
        "X>q7@bAuHrcP3L2_`6x)_>^v5;&o?@Fdagv_Uo9H*utGOGEJ93R6P|L2rgx{U}Y-UnrS3sKYtPIbF!WdDS7|dsT<9UQCqzhJe8+4kK5km%Xv"
        "Hjm=J(sMgqk-e3v^zjTJayVggoDWMJzTWE4a0T)3l-9P!ydlNePrBA?Xny*@kmBo4W|8$?wEo20v5Uy_5"
    ),
    "IQ3_S": (
        "c-k#d!AiqG5PdVu!e&pqA>uXNMyUCUt<-~hDT4SrX{pfmmf{D9Rs{Q#&TgE;z`Qr}-rMBob#A|%IbF{W(Id*&Lkwq!%0~0(%@Ao{OU0lD_x2"
        "OXCI^OquXIKLt}o^pYnG?L6&oz+9HeSVPSrN(A}t!YmF^Xmp*3Qy-5G8(e|b5Y-VC?q(AA>+32wuC)HmEXp@c1}PT|h83}iuXSwt^ePGkv?U"
        "+Lf3a_=1ov?9@{igP&9v4ypFswx3&TJZ@M2_=SuX>*z&qp%+CoXl)ge8!drA@5Agyn!FG+()?*sDei}n1QT95(J|p-wR7#Aht{0!Hx!aZfy;"
        "cl!bD4D3uqR(zW`GY5;6>@R{_|3X$jRqNR^eu)^e<Ll^vCYlKPU1;QQ+o$IB(hKom+bHx0SXmXXwyZnVo8~6jd#wQ>"
    ),
    "IQ1_S": (
        "c-k#eK}(!R7=CxE;dM-9V?RN1diSfb(^(PgE$L;EU0C#DLh=VZ*|bQ>IZZw%yXlwN6ha`hG?#HO$v6$G@ldv(umMk2dT8mb2WdTox*h^v8Vt"
        "nDuD#8?@Vw9Syw7v(LR2?w<}y}3b9YJG^C&5*&qs>Nl?x;NhAB!%0hRecnsm$a2YwJ@;QqccSPG~@n#@N5uBY$^gNY22s7}?HYgoxmY#Y+!A"
        "jh1yxWA4l1OzVO1-XRyWBes^wA;LAoBq<x!%nuPhFWp9`{&R@7DG%<XIwD^Is3Q$Jf@<B<<hd(0^?jzIHG8vQn*?-$Ub(LsHW&@kYNcQ%|}d"
        "P%c;av8KJU^mWiJv*28-WD<$YEG%#}+D!ES;XeDuFD(VlG#i@A4$V;H%7rH52w&LB_pg1xSvl=L<CZ@9?{WdkSxbxSuMq|l64F4MqT|O(RS}"
        "O@H(bLXvHn!_OntvSw2GXTKiD_6XGLxujp0!)qyF+V=7Bv?g3oFy??D1-6?{(2le%HQrc>Le(m#@Cb_P%)g$;r#{<KcsUbe#9?p_<1{H>jE?"
        "+1SCIq;Fwj@yPMjA_U90?}vdY$)D1%>fQq-z{36HBT$I&mG*v%J#A~V%aSj@pZtCEAg}V1eou`2@uUxU_YQ=)6;l3U7EjmAKr#y2F0kdO91c"
        "}@u6ikZ68>90+)KINV7E3oVy0wcNC7Qg*Gnz$6Ckekcj5w;yQl$8BcV}uIeIA*;9XR~L2uzcrHYS+2)y-rqrtcg6e{stpn$cM#il(dTBx(R&"
        "0u-;P1DmAvG}u@dX;b%ns9v~6p49X^c}lqEMlIFjzJBbrp$X4T{{D_p5YV7e^~xM<^E7<_56qcAaL=FI+lT|4v2#Y&dpW2-Egd@Fdf5G@Dhe"
        "eu*|v(bMFD;1sQ1"
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Codebook:
    """V vectors of `size` digits below `base`."""

    name: str
    size: int
    base: int
    levels: tuple[int, ...]
    """What the digits stand for in a block."""
    distances: int
    """How many distances ggml's neighbours have."""

    @property
    def is_ternary(self) -> bool:
        """Whether its vectors have signs of their own, and are shifted by SHIFT up or down instead."""
        return self.levels[0] < 0

    @cached_property
    def digits(self) -> Tensor:
        """uint8 `[V, size]`."""
        bits = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(_SETS[self.name]))), dtype=torch.uint8)
        numbers = ((bits.view(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().nonzero().flatten()
        return (numbers.view(-1, 1) // self._powers % self.base).to(torch.uint8)

    @cached_property
    def values(self) -> Tensor:
        """What a block's vectors are, float32 `[V, size]`."""
        return torch.tensor(self.levels, dtype=torch.float32)[self.digits.long()]

    @cached_property
    def place(self) -> Tensor:
        """For every number of `size` digits the index of its vector, or -1: int64 `[base^size]`."""
        place = torch.full((self.base**self.size,), -1)
        place[self.number(self.digits.t())] = torch.arange(len(self.digits))
        return place

    @cached_property
    def neighbours(self) -> Tensor:
        """For every number whose vector the codebook does not have, the indices of its neighbours, the nearest first
        and of equals the lower one first, then -1: int16 `[base^size, ..]`."""
        everything = torch.arange(self.base**self.size).view(-1, 1) // self._powers % self.base
        squared = torch.cdist(everything.float(), self.digits.float()).square().round().to(torch.int32)
        squared[self.place >= 0] = 2**30
        farthest = squared.amin(dim=1, keepdim=True)
        for _ in range(self.distances - 1):
            farthest = torch.where(squared > farthest, squared, 2**30).amin(dim=1, keepdim=True)
        rows, index = ((squared <= farthest) & (squared < 2**30)).nonzero(as_tuple=True)
        # One stable sort by row and distance: `nonzero` has the indices of a row in order.
        order = torch.argsort(rows * 2**10 + squared[rows, index], stable=True)
        rows, index = rows[order], index[order]
        counts = torch.bincount(rows, minlength=len(squared))
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        found = torch.full((len(squared), int(counts.max())), -1, dtype=torch.int16)
        found[rows, within] = index.to(torch.int16)
        return found

    def number(self, digits: Tensor) -> Tensor:
        """Digits `[size, ..]` to the number that they write, int64."""
        return sum(digits[i].long() * self.base**i for i in range(self.size))

    @property
    def _powers(self) -> Tensor:
        return self.base ** torch.arange(self.size)


SHIFT = 0.125
_TWO_BITS, _THREE_BITS = (8, 25, 43), (4, 12, 20, 28, 36, 44, 52, 62)
_ONE_BIT = Codebook("IQ1_S", 8, 3, (-1, 0, 1), 3)
CODEBOOKS = {
    "IQ2_XXS": Codebook("IQ2_XXS", 8, 3, _TWO_BITS, 2),
    "IQ2_XS": Codebook("IQ2_XS", 8, 3, _TWO_BITS, 2),
    "IQ2_S": Codebook("IQ2_S", 8, 3, _TWO_BITS, 1),
    "IQ3_XXS": Codebook("IQ3_XXS", 4, 8, _THREE_BITS, 2),
    "IQ3_S": Codebook("IQ3_S", 4, 8, tuple(range(1, 16, 2)), 3),
    "IQ1_S": _ONE_BIT,
    "IQ1_M": _ONE_BIT,
}
"""By block type."""


def values(vectors: Vectors, book: Codebook) -> Tensor:
    """What the weights are in units of their group's scale: float32 `[B, 256]`."""
    found = book.values.to(vectors.scale.device)[vectors.index.long()].flatten(1)
    if book.is_ternary:
        return found + (SHIFT - 2 * SHIFT * vectors.signs.float()).repeat_interleave(book.size, dim=1)
    return torch.where(unpack_bits(vectors.signs, 1, 1) == 1, -found, found)
