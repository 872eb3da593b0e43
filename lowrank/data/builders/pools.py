"""Words that fill the open slots of templates, disjoint between the splits.

Areas, floors, device names and free text belong to a user's home, so the package of
templates leaves them open. Each split has its own words: a model that has learned
"kitchen" by heart meets only "attic" in the test split.
"""

from collections.abc import Mapping

SPLITS = ("train", "validation", "test")

#: slot -> one tuple of values per split, in the order of `SPLITS`
Pools = Mapping[str, tuple[tuple[str, ...], ...]]


def _words(*parts: str) -> tuple[tuple[str, ...], ...]:
    """One tuple per split, from text with commas."""
    return tuple(tuple(part.split(", ")) for part in parts)


ENGLISH: Pools = {
    "area": _words(
        "kitchen, living room, bedroom, garage, bathroom, hallway, office, basement, "
        "dining room, nursery",
        "playroom, entrance, workshop, lounge, library",
        "attic, porch, study, pantry, den, sunroom, gym, balcony",
    ),
    "floor": _words(
        "first, ground, upper, second",
        "fourth, middle",
        "third, lower, top",
    ),
    "name": _words(
        "ceiling fan, desk lamp, front door, thermostat, tv, coffee maker, "
        "left blind, heater, night light, speaker",
        "humidifier, back gate, projector, doorbell, bedside sconce",
        "air purifier, patio awning, radio, right curtain, kettle, wall spotlight, "
        "skylight opener, freezer",
    ),
    "zone": _words(
        "the school, the station, my workplace, the gymnasium",
        "the harbor, the mall",
        "the airport, the hospital, the stadium",
    ),
    "message": _words(
        "dinner is ready, the bus leaves soon, happy birthday, "
        "please come downstairs, our guests have arrived",
        "lunch will be late, wash your hands, the taxi waits outside",
        "time to go to bed, breakfast at eight, the movie begins, somebody rang twice",
    ),
    "search_query": _words(
        "jazz music, the beatles, relaxing piano, bohemian rhapsody, rock classics",
        "country ballads, mozart, summer hits",
        "taylor swift, folk songs, soft violin, vivaldi",
    ),
    "timer_name": _words(
        "pasta, washing machine, eggs, pizza, bread",
        "nap, soup, yoga",
        "rice, homework, roast, workout",
    ),
    "timer_command": _words(
        "lock up the house, start the sprinklers, stop the music, close every shutter",
        "feed the cat, water the plants",
        "charge the car, dim everything, shut down the computer",
    ),
    "shopping_list_item": _words(
        "milk, butter, orange juice, eggs, flour, bread",
        "cheese, potatoes, honey",
        "apples, rice, toothpaste, onions",
    ),
    "todo_list_item": _words(
        "call mom, pay the rent, mow the lawn, fix the bike",
        "renew my passport, clean windows, iron shirts",
        "pick up parcels, book a dentist, walk the dog, file taxes",
    ),
}

#: Own words for these languages where they have them; the English ones elsewhere.
OTHERS: Mapping[str, Pools] = {
    "de": {
        "area": _words(
            "wohnzimmer, schlafzimmer, garage, bad, flur, esszimmer, kinderzimmer, "
            "arbeitszimmer",
            "keller, werkstatt, eingang, hobbyraum",
            "dachboden, speisekammer, wintergarten, balkon, terrasse",
        ),
        "floor": _words(
            "ersten, oberen",
            "mittleren",
            "zweiten, unteren",
        ),
        "name": _words(
            "deckenlampe, ventilator, fernseher, kaffeemaschine, heizung, nachtlicht, "
            "lautsprecher",
            "luftbefeuchter, beamer, gartentor, klingel",
            "luftreiniger, markise, radio, wasserkocher, wandstrahler",
        ),
        "shopping_list_item": _words(
            "milch, butter, eier, mehl, brot",
            "quark, kartoffeln, honig",
            "reis, zahnpasta, zwiebeln, tomaten",
        ),
    },
    "fr": {
        "area": _words(
            "cuisine, salon, chambre, garage, couloir, bureau",
            "atelier, cave, cellier",
            "grenier, terrasse, buanderie, balcon",
        ),
        "floor": _words(
            "premier, dernier",
            "quatrieme",
            "second, troisieme",
        ),
        "name": _words(
            "ventilateur, lampe de bureau, chauffage, cafetiere, enceinte",
            "humidificateur, projecteur, sonnette",
            "purificateur, store banne, radio, bouilloire",
        ),
        "shopping_list_item": _words(
            "lait, beurre, farine, pain",
            "fromage, miel",
            "pommes, riz, dentifrice, oignons",
        ),
    },
    "es": {
        "area": _words(
            "cocina, sala, dormitorio, garaje, pasillo, oficina",
            "taller, entrada, bodega",
            "terraza, lavadero, biblioteca, trastero, gimnasio",
        ),
        "floor": _words(
            "primera, segunda",
            "cuarta",
            "tercera, quinta",
        ),
        "name": _words(
            "ventilador, termostato, televisor, cafetera, altavoz",
            "humidificador, proyector, timbre",
            "purificador, toldo, radio, hervidor",
        ),
        "shopping_list_item": _words(
            "leche, mantequilla, harina, pan",
            "queso, miel",
            "manzanas, arroz, cebollas, tomates",
        ),
    },
}


def pools_of(language: str) -> Pools:
    """The pools of a language: its own, and the English ones for the other slots."""
    return {**ENGLISH, **OTHERS.get(language, {})}
