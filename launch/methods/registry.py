"""The methods by name: the values of `adapter.method`."""

from launch.methods import astra, corda, eva, full, lora, lora_ga, olora, pissa
from launch.methods.base import Method

METHODS: dict[str, Method] = {
    "astra": astra.METHOD,
    "lora": lora.METHOD,
    "rslora": lora.RSLORA,
    "dora": lora.DORA,
    "pissa": pissa.METHOD,
    "milora": pissa.MILORA,
    "olora": olora.METHOD,
    "corda": corda.METHOD,
    "eva": eva.METHOD,
    "lora_ga": lora_ga.METHOD,
    "full": full.METHOD,
}
