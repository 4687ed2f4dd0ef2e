"""256 short English nouns: the keys, variables and list entries of the tasks. Order is fixed."""

from __future__ import annotations

_TEXT = """
acorn actor album alley amber anchor angle ankle apple apron arch armor arrow atlas attic award
badge bagel baker basil basin beach beard beast berry birch blade blaze board bonus brain brake
branch brass bread brick bride broom brush cabin cable camel candle canoe canyon cargo carpet
castle cedar chain chair chalk cherry chess chest chief cider circle cliff cloak clock cloud
clover coach coast cobra comet coral couch crane crown crystal curtain daisy dance desert diary
dragon dream dress drum eagle earth elbow engine fabric falcon farmer feast fence ferry fiddle
field finger flame flute forest fossil fruit funnel galaxy garage garden garlic ghost giant
ginger glacier glass globe glove grape grass guitar hammer harbor hawk hazel heart hedge helmet
hermit honey horse hotel island ivory jacket jelly jewel jungle kettle kitten knife knight
ladder lagoon lake lamp lantern laser lemon leopard letter lily linen lion lizard lobby lotus
magnet mango maple marble market meadow medal melon metal mint mirror monkey moon motor
mountain museum needle nest noodle novel nurse oasis ocean olive onion orange orchid otter
owl oyster paddle palace panda paper parrot peach pearl pebble pencil penguin pepper piano
pigeon pillow pilot pirate planet plum pocket poet pond potato prince puzzle quartz queen
rabbit radio raven ribbon river robin rocket roof rose ruby saddle sailor salmon sand scarf
shadow shark sheep shell silver singer spider spoon squirrel statue stone storm sugar
summer sunset table tailor temple tiger timber tomato tower trumpet tulip tunnel turtle valley
velvet violin wagon walnut whale willow winter wizard
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
