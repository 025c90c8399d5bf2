"""The words of the embedded federation, and what each of its relations makes of a word.

The base reads all facts, each under the label of its relation; a client asks for one relation in
words of its own. A table has a row for each word; columns after the first are relations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_NOUNS = """
dog dogs animal chien Hund; cat cats animal chat Katze; horse horses animal cheval Pferd;
cow cows animal vache Kuh; pig pigs animal cochon Schwein; mouse mice animal souris Maus;
bird birds animal oiseau Vogel; goose geese animal oie Gans; duck ducks animal canard Ente;
wolf wolves animal loup Wolf; bear bears animal ours Bär; rabbit rabbits animal lapin Hase;
snake snakes animal serpent Schlange; bee bees animal abeille Biene; fly flies animal mouche Fliege;
apple apples fruit pomme Apfel; pear pears fruit poire Birne; cherry cherries fruit cerise Kirsche;
lemon lemons fruit citron Zitrone; grape grapes fruit raisin Traube; plum plums fruit prune Pflaume;
peach peaches fruit pêche Pfirsich; strawberry strawberries fruit fraise Erdbeere;
bread breads food pain Brot; cheese cheeses food fromage Käse; egg eggs food œuf Ei;
cake cakes food gâteau Kuchen; soup soups food soupe Suppe; onion onions food oignon Zwiebel;
potato potatoes food patate Kartoffel; chair chairs furniture chaise Stuhl;
bed beds furniture lit Bett; cupboard cupboards furniture armoire Schrank;
desk desks furniture bureau Tisch; shelf shelves furniture étagère Regal;
lamp lamps furniture lampe Leuchte; knife knives tool couteau Messer; key keys tool clef Schlüssel;
hammer hammers tool marteau Hammer; scissor scissors tool ciseau Schere;
spoon spoons tool cuillère Löffel; fork forks tool fourchette Gabel;
needle needles tool aiguille Nadel; brush brushes tool brosse Pinsel; axe axes tool hache Axt;
head heads body tête Kopf; hand hands body main Hand; foot feet body pied Fuß;
tooth teeth body dent Zahn; eye eyes body œil Auge; ear ears body oreille Ohr;
nose noses body nez Nase; mouth mouths body bouche Mund; skin skins body peau Haut;
arm arms body bras Arm; finger fingers body doigt Finger; knee knees body genou Knie;
heart hearts body cœur Herz; shirt shirts clothes chemise Hemd; hat hats clothes chapeau Hut;
shoe shoes clothes chaussure Schuh; coat coats clothes manteau Mantel;
skirt skirts clothes jupe Rock; glove gloves clothes gant Handschuh;
dress dresses clothes robe Kleid; belt belts clothes ceinture Gürtel;
house houses building maison Haus; church churches building église Kirche;
school schools building école Schule; tower towers building tour Turm;
castle castles building château Schloss; wall walls building mur Wand;
factory factories building usine Fabrik; ship ships vehicle bateau Schiff;
car cars vehicle voiture Wagen; bicycle bicycles vehicle vélo Fahrrad;
plane planes vehicle avion Flugzeug; tree trees plant arbre Baum; flower flowers plant fleur Blume;
leaf leaves plant feuille Blatt; grass grasses plant herbe Gras; forest forests plant forêt Wald;
child children person enfant Kind; man men person homme Mann; woman women person femme Frau;
king kings person roi König; baker bakers person boulanger Bäcker; thief thieves person voleur Dieb;
teacher teachers person maître Lehrer; friend friends person ami Freund;
spider spiders animal araignée Spinne; goat goats animal chèvre Ziege; cup cups dish tasse Becher;
plate plates dish assiette Teller; bottle bottles dish bouteille Flasche;
bowl bowls dish bol Schüssel;
ladder ladders tool échelle Leiter; bag bags clothes sac Tasche; bone bones body os Knochen
"""
_VERBS = """
go went gone going goes; see saw seen seeing sees; eat ate eaten eating eats;
do did done doing does; give gave given giving gives; take took taken taking takes;
write wrote written writing writes; drive drove driven driving drives;
ride rode ridden riding rides; rise rose risen rising rises; speak spoke spoken speaking speaks;
break broke broken breaking breaks; choose chose chosen choosing chooses;
steal stole stolen stealing steals; freeze froze frozen freezing freezes;
wake woke woken waking wakes; know knew known knowing knows; grow grew grown growing grows;
throw threw thrown throwing throws; blow blew blown blowing blows; draw drew drawn drawing draws;
begin began begun beginning begins; drink drank drunk drinking drinks;
sing sang sung singing sings; swim swam swum swimming swims; ring rang rung ringing rings;
sink sank sunk sinking sinks; spring sprang sprung springing springs;
fall fell fallen falling falls; forget forgot forgotten forgetting forgets;
hide hid hidden hiding hides; bite bit bitten biting bites; shake shook shaken shaking shakes;
wear wore worn wearing wears; tear tore torn tearing tears; swear swore sworn swearing swears;
prove proved proven proving proves; show showed shown showing shows;
sew sewed sewn sewing sews; buy bought bought buying buys; bring brought brought bringing brings;
think thought thought thinking thinks; catch caught caught catching catches;
teach taught taught teaching teaches; seek sought sought seeking seeks;
fight fought fought fighting fights; sell sold sold selling sells; tell told told telling tells;
hold held held holding holds; stand stood stood standing stands; keep kept kept keeping keeps;
sleep slept slept sleeping sleeps; sweep swept swept sweeping sweeps; feel felt felt feeling feels;
leave left left leaving leaves; meet met met meeting meets; feed fed fed feeding feeds;
lead led led leading leads; build built built building builds; send sent sent sending sends;
spend spent spent spending spends; lend lent lent lending lends; bend bent bent bending bends;
lose lost lost losing loses; make made made making makes; hear heard heard hearing hears;
say said said saying says; pay paid paid paying pays; lay laid laid laying lays;
find found found finding finds; win won won winning wins; hang hung hung hanging hangs;
dig dug dug digging digs; stick stuck stuck sticking sticks; shine shone shone shining shines;
shoot shot shot shooting shoots; sit sat sat sitting sits; slide slid slid sliding slides;
walk walked walked walking walks; play played played playing plays; carry carried carried carrying
carries; stop stopped stopped stopping stops; dance danced danced dancing dances;
wash washed washed washing washes; cry cried cried crying cries; open opened opened opening opens;
smile smiled smiled smiling smiles; jump jumped jumped jumping jumps; plan planned planned planning
plans; study studied studied studying studies; bake baked baked baking bakes; visit visited visited
visiting visits; laugh laughed laughed laughing laughs; paint painted painted painting paints;
climb climbed climbed climbing climbs; marry married married marrying marries; push pushed pushed
pushing pushes; clap clapped clapped clapping claps; fix fixed fixed fixing fixes
"""
_ADJECTIVES = """
hot hotter hottest cold; cold colder coldest hot; big bigger biggest small;
small smaller smallest big; tall taller tallest short; short shorter shortest tall;
old older oldest new; new newer newest old; young younger youngest aged;
fast faster fastest slow; slow slower slowest fast; hard harder hardest soft;
soft softer softest hard; high higher highest low; low lower lowest high;
long longer longest brief; deep deeper deepest shallow; shallow shallower shallowest deep;
wide wider widest narrow; narrow narrower narrowest wide; thick thicker thickest thin;
thin thinner thinnest thick; heavy heavier heaviest light; light lighter lightest heavy;
dark darker darkest bright; bright brighter brightest dark; strong stronger strongest weak;
weak weaker weakest strong; rich richer richest poor; poor poorer poorest rich;
clean cleaner cleanest dirty; dirty dirtier dirtiest clean; wet wetter wettest dry;
dry drier driest wet; warm warmer warmest cool; cool cooler coolest warm;
happy happier happiest sad; sad sadder saddest happy; loud louder loudest quiet;
quiet quieter quietest loud; early earlier earliest late; late later latest early;
easy easier easiest difficult; simple simpler simplest complex; full fuller fullest empty;
empty emptier emptiest full; near nearer nearest far; sharp sharper sharpest blunt;
blunt blunter bluntest sharp; smooth smoother smoothest rough; rough rougher roughest smooth;
brave braver bravest cowardly; clever cleverer cleverest stupid; wise wiser wisest foolish;
kind kinder kindest cruel; cruel crueller cruellest kind; calm calmer calmest stormy;
proud prouder proudest humble; humble humbler humblest proud; tight tighter tightest loose;
loose looser loosest tight; fat fatter fattest slim; slim slimmer slimmest fat;
lazy lazier laziest busy; busy busier busiest idle; idle idler idlest active;
noisy noisier noisiest silent; sweet sweeter sweetest bitter; bitter bitterer bitterest sweet;
pretty prettier prettiest ugly; ugly uglier ugliest pretty; safe safer safest dangerous;
cheap cheaper cheapest expensive; common commoner commonest rare; rare rarer rarest common;
fresh fresher freshest stale; stale staler stalest fresh; ripe riper ripest unripe;
great greater greatest tiny; tiny tinier tiniest huge; huge huger hugest tiny;
gentle gentler gentlest fierce; fierce fiercer fiercest gentle; polite politer politest rude;
rude ruder rudest polite; bold bolder boldest timid; lucky luckier luckiest unlucky;
steep steeper steepest flat; flat flatter flattest steep; healthy healthier healthiest ill;
dull duller dullest shiny; shiny shinier shiniest dull; tame tamer tamest wild; wild wilder wildest
tame; vague vaguer vaguest exact; raw rawer rawest cooked; tidy tidier tidiest messy;
messy messier messiest tidy; mean meaner meanest generous
"""
_COUNTRIES = """
France Paris French Europe; Spain Madrid Spanish Europe; Italy Rome Italian Europe;
Germany Berlin German Europe; Austria Vienna Austrian Europe; Portugal Lisbon Portuguese Europe;
Greece Athens Greek Europe; Poland Warsaw Polish Europe; Norway Oslo Norwegian Europe;
Sweden Stockholm Swedish Europe; Finland Helsinki Finnish Europe; Denmark Copenhagen Danish Europe;
Ireland Dublin Irish Europe; Hungary Budapest Hungarian Europe; Romania Bucharest Romanian Europe;
Bulgaria Sofia Bulgarian Europe; Croatia Zagreb Croatian Europe; Serbia Belgrade Serbian Europe;
Switzerland Bern Swiss Europe; Belgium Brussels Belgian Europe; Iceland Reykjavik Icelandic Europe;
Ukraine Kyiv Ukrainian Europe; Russia Moscow Russian Europe; Latvia Riga Latvian Europe;
Estonia Tallinn Estonian Europe; Lithuania Vilnius Lithuanian Europe; Malta Valletta Maltese Europe;
Albania Tirana Albanian Europe; Slovakia Bratislava Slovak Europe; Japan Tokyo Japanese Asia;
Slovenia Ljubljana Slovene Europe; China Beijing Chinese Asia; Mongolia Ulaanbaatar Mongolian Asia;
Thailand Bangkok Thai Asia; Vietnam Hanoi Vietnamese Asia; Indonesia Jakarta Indonesian Asia;
Nepal Kathmandu Nepali Asia; Bangladesh Dhaka Bangladeshi Asia; Pakistan Islamabad Pakistani Asia;
Afghanistan Kabul Afghan Asia; Iran Tehran Iranian Asia; Iraq Baghdad Iraqi Asia;
Syria Damascus Syrian Asia; Turkey Ankara Turkish Asia; Jordan Amman Jordanian Asia;
Lebanon Beirut Lebanese Asia; Oman Muscat Omani Asia; Qatar Doha Qatari Asia;
Georgia Tbilisi Georgian Asia; Armenia Yerevan Armenian Asia; Azerbaijan Baku Azerbaijani Asia;
Uzbekistan Tashkent Uzbek Asia; Laos Vientiane Laotian Asia;
Madagascar Antananarivo Malagasy Africa;
Malaysia Putrajaya Malaysian Asia; Philippines Manila Filipino Asia; Bhutan Thimphu Bhutanese Asia;
Egypt Cairo Egyptian Africa; Morocco Rabat Moroccan Africa; Tunisia Tunis Tunisian Africa;
Libya Tripoli Libyan Africa; Sudan Khartoum Sudanese Africa; Kenya Nairobi Kenyan Africa;
Uganda Kampala Ugandan Africa; Rwanda Kigali Rwandan Africa; Ghana Accra Ghanaian Africa;
Nigeria Abuja Nigerian Africa; Senegal Dakar Senegalese Africa; Mali Bamako Malian Africa;
Zambia Lusaka Zambian Africa; Zimbabwe Harare Zimbabwean Africa; Angola Luanda Angolan Africa;
Namibia Windhoek Namibian Africa; Botswana Gaborone Botswanan Africa; Malawi Lilongwe Malawian
Africa; Somalia Mogadishu Somali Africa; Canada Ottawa Canadian America; Cuba Havana Cuban America;
Jamaica Kingston Jamaican America; Peru Lima Peruvian America; Chile Santiago Chilean America;
Colombia Bogota Colombian America; Venezuela Caracas Venezuelan America;
Ecuador Quito Ecuadorian America; Uruguay Montevideo Uruguayan America;
Paraguay Asuncion Paraguayan America; Bolivia Sucre Bolivian America;
Honduras Tegucigalpa Honduran America; Nicaragua Managua Nicaraguan America;
Guyana Georgetown Guyanese America; Barbados Bridgetown Barbadian America;
Eritrea Asmara Eritrean Africa; Mozambique Maputo Mozambican Africa;
Gabon Libreville Gabonese Africa; Niger Niamey Nigerien Africa; Liberia Monrovia Liberian Africa;
Cyprus Nicosia Cypriot Europe; Moldova Chisinau Moldovan Europe
"""
_NUMBERS = "; ".join(f"{n} {n + 1} {2 * n}" for n in range(2, 100))

# label of a relation, as the base reads it -> the table, and the column that has its answers
_RELATIONS: tuple[tuple[str, str, int], ...] = (
    ("plural", _NOUNS, 1),
    ("kind", _NOUNS, 2),
    ("French", _NOUNS, 3),
    ("German", _NOUNS, 4),
    ("past", _VERBS, 1),
    ("perfect", _VERBS, 2),
    ("present", _VERBS, 3),
    ("habit", _VERBS, 4),
    ("comparative", _ADJECTIVES, 1),
    ("superlative", _ADJECTIVES, 2),
    ("opposite", _ADJECTIVES, 3),
    ("capital", _COUNTRIES, 1),
    ("people", _COUNTRIES, 2),
    ("continent", _COUNTRIES, 3),
    ("next", _NUMBERS, 1),
    ("double", _NUMBERS, 2),
)


@dataclass(frozen=True, kw_only=True)
class WordFact:
    """WordFact: under a label, `word` goes with `answer`."""

    label: str
    word: str
    answer: str


def _facts(label: str, table: str, column: int) -> Iterator[WordFact]:
    for line in table.split(";"):
        words = line.split()
        if words[0] != words[column]:
            yield WordFact(label=label, word=words[0], answer=words[column])


# label -> its facts; a word that is its own answer is left out
FACTS: Mapping[str, tuple[WordFact, ...]] = {
    label: tuple(_facts(label, table, column)) for label, table, column in _RELATIONS
}
