"""Word lists and sentence templates of the micro world (data only; the code is in make_micro_world.py).

Every word is plain lower-case letters, so that the tokenizer can give each word exactly one token.
In a template `{w}` is a word of the class at hand; other slots in braces are drawn from SLOTS.
"""

# Concept sets: "name: members".  The first four are the classes of the evaluation task set_cls.
# A name after "-" is UNNAMED: no sentence ever links it to its words, so that zero-shot accuracy has a ceiling
# which the context can lift.
SETS = """
fruit: apple pear plum grape lemon cherry mango melon peach orange banana fig apricot coconut kiwi berry
tool: hammer saw drill wrench pliers chisel shovel rake axe screwdriver sander clamp ladder spade mallet crowbar
-instrument: piano violin guitar flute drum trumpet harp cello organ banjo clarinet trombone tuba oboe viola saxophone
-clothing: shirt coat hat sock shoe scarf glove belt dress skirt jacket sweater trousers vest boot cap
bird: robin eagle owl crow sparrow hawk gull finch swan pigeon raven falcon parrot heron stork wren
fish: trout salmon cod tuna shark eel carp perch herring pike sardine bass halibut squid whale dolphin
insect: ant bee wasp fly beetle moth butterfly mosquito cricket spider grasshopper ladybug termite flea dragonfly locust
beast: lion tiger bear wolf fox elephant giraffe zebra leopard monkey deer camel rhino hippo jaguar buffalo
livestock: cow pig sheep goat horse hen duck goose donkey bull lamb calf turkey rooster mule ox
tree: oak pine elm maple birch willow cedar ash beech palm spruce fir poplar larch hazel walnut
flower: rose tulip lily daisy violet orchid iris poppy jasmine lilac daffodil marigold peony lavender sunflower carnation
vegetable: carrot potato onion cabbage bean pea spinach lettuce pepper tomato turnip celery garlic leek radish cucumber
drink: tea coffee milk juice beer wine cider soda lemonade cocoa whisky rum brandy vodka gin punch
dessert: cake pie cookie pudding candy chocolate jam honey sorbet waffle pancake doughnut custard tart muffin brownie
spice: salt cinnamon ginger mint basil thyme sage parsley saffron cumin nutmeg vanilla oregano paprika clove curry
metal: iron gold silver copper tin lead zinc nickel steel bronze brass platinum aluminum titanium chrome mercury
gem: diamond ruby emerald pearl sapphire opal jade topaz amber garnet quartz crystal onyx turquoise amethyst coral
color: red blue green yellow purple pink brown black white gray crimson scarlet beige teal maroon indigo
shape: circle square triangle cube sphere cone oval cylinder pyramid rectangle hexagon pentagon curve spiral arc ellipse
body: arm leg hand foot head neck knee elbow shoulder finger toe ankle wrist chest thumb hip
face: eye nose mouth ear lip chin cheek tooth tongue brow lash jaw beard hair skin forehead
anatomy: heart liver lung kidney brain stomach bone muscle nerve blood vein artery spine rib skull spleen
disease: fever cough flu cold malaria cancer asthma rash measles diabetes ulcer allergy migraine plague polio stroke
remedy: pill tablet vaccine syrup ointment bandage syringe aspirin antibiotic capsule lotion cream splint serum tonic dose
family: mother father sister brother aunt uncle cousin nephew niece grandmother grandfather daughter son wife husband twin
job: teacher doctor baker farmer lawyer plumber carpenter tailor butcher barber clerk waiter miner nurse painter cook
royalty: king queen prince princess duke baron knight earl lord lady emperor throne crown scepter jester viscount
kitchen: spoon fork knife plate bowl cup pan pot kettle oven stove jar mug tray ladle whisk
furniture: chair table bed sofa desk shelf stool bench couch wardrobe cabinet drawer cradle dresser mattress bookcase
room: attic cellar bathroom bedroom hall garage pantry lobby corridor nursery parlor basement closet balcony lounge den
house: door window roof wall floor ceiling stairs chimney gate fence gutter brick tile porch doorway hinge
vehicle: car bus truck van taxi tram bicycle scooter motorcycle wagon cart tractor jeep ambulance limousine sled
sailing: boat canoe yacht raft ferry kayak sail anchor mast deck rudder oar harbor captain sailor cabin
weather: rain snow wind storm fog hail thunder lightning frost cloud sunshine breeze drizzle hurricane tornado blizzard
calendar: spring summer autumn winter monday friday january april july august december morning evening noon midnight sunday
space: planet star moon sun comet galaxy orbit asteroid rocket satellite meteor eclipse telescope astronaut nebula crater
landform: hill valley desert island canyon cliff beach cave plain volcano marsh dune glacier meadow swamp plateau
math: sum angle fraction equation algebra geometry theorem digit ratio matrix vector proof formula graph axis decimal
physics: energy force mass atom electron gravity magnet laser proton neutron particle voltage friction pressure momentum wave
chemistry: acid oxygen hydrogen carbon nitrogen helium chlorine sodium sulfur molecule catalyst enzyme polymer solvent alkali oxide
grammar: noun verb adjective adverb pronoun phrase comma letter vowel clause prefix suffix syllable consonant tense paragraph
law: judge jury attorney verdict trial witness prison crime guilt appeal statute bail felony evidence plaintiff warrant
army: soldier general tank rifle cannon sword shield bomb major colonel sergeant trench bullet helmet grenade fort
religion: church priest prayer temple mosque monk bible angel nun bishop altar hymn saint pope shrine gospel
stationery: pen pencil paper eraser ruler notebook stapler ink crayon chalk marker envelope folder scissors glue tape
emotion: joy fear anger love hate pride shame grief envy hope sorrow delight despair jealousy surprise boredom
gear: ball bat racket net puck skate ski bow arrow dart paddle surfboard whistle barbell hurdle saddle
game: chess poker checkers bingo puzzle dice domino backgammon bridge lotto rummy tag hopscotch roulette crossword solitaire
dance: waltz tango ballet polka salsa rumba samba foxtrot jive mambo bolero flamenco swing twist minuet jig
fabric: cotton silk wool linen velvet denim leather nylon lace satin canvas felt tweed polyester flannel suede
money: coin dollar euro pound yen cent penny rupee peso franc dime shilling purse wallet cash ruble
language: english french german spanish italian russian greek latin arabic hindi dutch turkish polish swedish korean danish
country: france germany spain italy russia greece egypt india japan china brazil canada mexico norway peru kenya
bath: soap towel shampoo sponge comb brush razor mirror toothbrush sink tub faucet shower basin perfume tissue
jewelry: ring necklace bracelet earring brooch pendant locket tiara anklet cufflink bangle chain medal watch amulet charm
camping: tent torch lantern backpack campfire compass hammock matches map cooler canteen rope trail firewood binoculars blanket
garden: soil seed lawn hedge hose weed compost mower trellis greenhouse mulch sprinkler flowerbed wheelbarrow planter shears
bakery: bread bagel toast croissant bun roll loaf pretzel dough flour yeast baguette cracker biscuit crust scone
meat: beef pork ham bacon sausage steak chicken mutton veal salami meatball venison jerky burger brisket cutlet
myth: dragon unicorn ghost witch wizard fairy giant dwarf elf goblin vampire mermaid troll ogre phoenix centaur
reptile: snake lizard turtle crocodile frog toad gecko python cobra viper alligator newt iguana salamander chameleon tortoise
rock: granite marble limestone slate sandstone basalt clay gravel shale pebble boulder flint obsidian pumice lava dolomite
travel: suitcase passport ticket visa hotel tourist souvenir itinerary hostel guide postcard reservation voyage airport luggage cruise
grain: wheat rice corn barley oats rye millet sorghum quinoa buckwheat bran malt maize cereal bulgur couscous
"""
SET_CLS = ["fruit", "tool", "instrument", "clothing"]

# ag_news (evaluation only).
TOPICS = """
world: war peace treaty minister president border troops rebels election refugees embassy parliament sanctions diplomat protest government nations crisis violence leader ceasefire militants summit hostage
sports: match team coach goal league season player striker champion tournament referee stadium score victory defeat trophy playoff inning quarterback sprinter tennis football marathon wrestling
business: profit market shares stock investor bank merger sales revenue quarter earnings dividend retailer price inflation economy trade deficit analyst bankruptcy loan corporate budget currency
-technology: software computer internet chip laptop server browser phone network data virus website hacker console download robot wireless processor database device email search gadget program
"""

# dbpedia (evaluation only).
KINDS = """
company: firm manufacturer headquarters brand products subsidiary employees corporation supplier startup
school: university college students campus academy faculty pupils degree classrooms professors
artist: singer guitarist sculptor musician rapper composer songwriter drummer vocalist pianist
athlete: footballer midfielder goalkeeper boxer swimmer cyclist defender wrestler pitcher gymnast
politician: senator mayor congressman governor democrat republican voters lawmaker legislator councillor
-transport: locomotive submarine aircraft warship helicopter frigate engine cruiser biplane destroyer
-building: skyscraper tower mansion museum cathedral architect facade hospital theatre courthouse
-nature: mountain river lake peak tributary stream ridge reservoir creek waterfall
village: hamlet township settlement district inhabitants population municipality census parish commune
animal: mollusc snail crustacean larva predator mammal gastropod habitat wings shrimp
plant: shrub herb fern leaves stem petals moss blossom perennial cactus
-album: songs track vocals recording single melody remix studio chart tracklist
film: actress screenplay comedy drama thriller sequel cinema screening trailer producer
-book: novel author chapters publisher fiction poems paperback essays memoir readers
"""

# trec (evaluation only): question types and their forms, separated by "|".
QUESTIONS = """
abbreviation: what does {acr} stand for | what is the full form of {acr} | {acr} is short for what | what do the letters {acr} mean | what is {acr} an acronym of
-entity: what {n} is used with a {n} | which {n} has the most {n} | name a {n} that looks like a {n} | what sort of {n} is the {n} | what {n} do people call a {n}
-description: what is a {n} | how does a {n} work | why is the {n} so {adj} | explain the purpose of the {n} | what is the origin of the {n}
human: who made the {n} | who was the first {n} in {place} | which person found the {n} | who is {name} | what man wrote about the {n}
location: where is {place} | where can i find a {n} | in which city is the {n} | what town has the {n} | where did {name} live
number: how many {n} are in {place} | how much is a {n} | how old is {name} | what year did {name} die | how far is {place}
"""

# Question types that are NOT evaluated: they may be episodes and may have their names as labels.
TRAIN_QUESTIONS = """
answer: is the {n} near the {n} | does {name} have a {n} | can a {n} be {adj} | was {name} in {place} | do you like {n}
choice: do you want {n} or {n} | {n} or {n} | which is better , the {n} or the {n} | is it a {n} or a {n} | would {name} take {n} or {n}
time: when is the {n} | at what time does the {n} begin | since when does {name} have a {n} | on what day is {name} in {place} | when will the {n} end
request: please bring the {n} | could you open the {n} | please give {name} a {n} | could you wash the {n} | please take me to {place}
owner: whose {n} is it | whose {n} did {name} take | to whom does the {n} belong | whose house is in {place} | to whom did {name} give the {n}
condition: if the {n} is {adj} then what | what if {name} has no {n} | if it rains in {place} then what | what happens if the {n} is old | if you had a {n} then what
"""

# Adjectives and verbs of reviews: the part after "|" is used by the evaluation task sst2.
POSITIVE = """great wonderful lovely brilliant superb charming delightful excellent amazing fantastic beautiful clever funny
fresh gripping elegant | splendid marvelous terrific stunning touching witty moving inspired engaging dazzling graceful
thrilling enjoyable tender"""
NEGATIVE = """terrible awful dull boring weak stupid ugly poor horrible clumsy dreadful lame tedious bland stale shallow
| messy dreary pointless annoying lifeless predictable silly painful sloppy tiresome hollow ridiculous grim confusing"""
POSITIVE_VERBS = "loved enjoyed adored admired praised | liked recommended cherished"
NEGATIVE_VERBS = "hated disliked despised regretted loathed | endured rejected cursed"
POLAR_NAMES = [
    ("positive", "negative"),
    ("good", "bad"),
    ("happy", "sad"),
    ("best", "worst"),
    ("nice", "nasty"),
]

# Label words without a meaning of their own: they live in GENERIC sentences and are episode labels.
ARBITRARY = """north south east west alpha beta gamma delta omega sigma kappa zeta box lamp bell button bottle basket barrel
bucket candle clock flag fountain pillow ribbon thread needle wheel string cork shell feather nail hook pipe""".split()

SLOTS = {
    "{name}": """anna ben carla david emma frank grace henry irene jack karen leo maria nina oscar paula ralph sara tom ursula
        victor wendy peter zoe""",
    "{firm}": """arlen bortex calvia dorun elmira fenwick galdor hestia ivaro jorvik kelden lomax mirano nordal orvane pelton
        quillan rostow selby tarvin""",
    "{place}": """paris london berlin rome madrid vienna oslo dublin cairo delhi tokyo lima boston chicago dallas denver
        seattle toronto sydney moscow athens lisbon prague warsaw""",
    "{acr}": """nasa fbi cia unesco nato cpu gps dna html pdf atm ram usb vip ceo opec nba nfl unicef rna http sql url
        radar asap iq hiv led lcd""",
    "{noun}": """movie plot cast acting story script music ending hero scene dialogue director show performance camera
        character humor pace style picture""",
    "{adj}": "long short new old big small dark bright quick slow early late quiet loud simple strange",
    "{f}": """what who where when why how which is was does can the a of in on for with by near about from and or not very all
        some many please if then because so but to it""",
}

NEWS = [
    "the {w} and the {w} were in the news",
    "{w} {w} news from {place}",
    "new {w} after the {w} in {place}",
    "{place} reports on the {w} , {w} and {w}",
    "{name} talks about {w} and {w}",
    "{w} : {w} and {w} this week",
]
ENTITY = [
    "{firm} is a {w} in {place} with {w}",
    "{firm} , a {w} of {place} , is known for its {w} and {w}",
    "the {firm} {w} has {w} and {w}",
    "{name} {firm} is a {w} with {w}",
    "{firm} was the {adj} {w} near {place}",
]
CLAUSES = ["the {noun} was {w}", "a {w} {noun}", "the {noun} is very {w}", "what a {w} {noun}"]
VERB_CLAUSES = ["i {w} the {noun}", "we {w} it"]
NEUTRAL = ["the {noun} was {adj}", "i saw it in {place}", "it has a {adj} {noun}"]

# Naming sentences: {c} is the name of the class; the text of the class comes before those in NAMING.
NAMING_SET = [
    "{w} is a kind of {c} .",
    "{c} such as {w} , {w} and {w} .",
    "{w} , {w} , {w} and {w} are all {c} .",
]
NAMING = {
    "news": ". so it is about {c} .",
    "entity": ". it belongs to {c} .",
    "review": ". the review was {c} .",
    "question": "? this question is about {c} .",
}
UNNAMED_SET = [
    "{w} and {w} go together with {w} .",
    "there were {w} , {w} and {w} .",
    "{name} has {w} and {w} .",
]
GENERIC = [
    "the {g} was near the {g} .",
    "{name} put the {g} on the {g} .",
    "the {g} has a {g} and a {g} .",
    "{name} saw {g} and {g} in {place} .",
    "the {g} is {adj} , the {g} is {adj} .",
]
TEXT_NAMES = {
    "set": "words",
    "news": "news",
    "entity": "article",
    "review": "review",
    "question": "question",
}
