"""What can happen in a story: the plots of the grammar, in the template language of `grammar.py`.

A plot names some slots of its own, and each of its rows fills them together, so that what is lost is what is found,
and what is broken is what is mended. Its beats are told in order; a choice does not go over the end of a line.
"""

from dataclasses import dataclass

# Slots that every plot may use.
PHRASES = {
    "day": "[One day|One morning|One sunny day|One afternoon|One cold morning]",
    "meet": "[Just then|Soon|After a while|A little later]",
    "joy": "[was very happy|jumped for joy|laughed and danced|smiled a big smile]",
    "sure": "[Of course|Yes, of course|Yes|Do not worry]",
    "thanks": '"Thank you, {friend}," said {hero}. "You are a [good|true|kind|wonderful] friend."',
}


@dataclass(frozen=True)
class Plot:
    slots: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    beats: str
    morals: tuple[str, ...]


LOST_THING = Plot(
    slots=("thing", "where"),
    rows=(
        ("red ball", "under a bush"),
        ("blue kite", "at the top of a tall tree"),
        ("little drum", "behind a big rock"),
        ("warm hat", "on an old stone wall"),
        ("silver bell", "in the tall grass"),
        ("toy boat", "next to a small bridge"),
        ("golden key", "under some yellow leaves"),
        ("wooden horse", "behind an old tree"),
        ("yellow scarf", "on a low branch"),
        ("soft blanket", "under a wooden bench"),
    ),
    beats="""
{hero} had a {thing}. [{He} loved it very much.|It was a gift from {his} [grandmother|mother|father].|]
{day}, {he} could not find the {thing}. {He} [felt very sad|began to cry|did not know what to do].
{He} looked [under the bed|behind the door|in the kitchen|in the big box], but it was not there.
[Then {he} looked [outside|on the road|near the well], but it was not there, either.|]
{meet}, {friend} the {fkind} came by. "[What is wrong|Why are you sad], {hero}?" asked {friend}.
"I lost my {thing}," said {hero}. "[Can|Will] you help me find it?"
"{sure}," said {friend}. "[Let us look together|We will find it together|I will help you]."
They went {to} and looked [everywhere|all around|for a long time].
At last, {friend} saw the {thing} {where}. "[Here it is|Look, there it is|I found it]!" {fhe} [called|cried].
{hero} {joy}. {thanks}
""",
    morals=(
        "a good friend helps when you are sad",
        "it is easier to find something when you look together",
        "nothing is lost as long as you have a friend",
    ),
)

SHARED_FOOD = Plot(
    slots=("food", "it"),
    rows=(
        ("a big apple pie", "pie"),
        ("a basket of berries", "berries"),
        ("a warm loaf of bread", "bread"),
        ("a honey cake", "cake"),
        ("a bag of nuts", "nuts"),
        ("a pot of soup", "soup"),
        ("a large cheese", "cheese"),
        ("a bowl of sweet plums", "plums"),
    ),
    beats="""
{day}, {his} [mother|grandmother|father] gave {him} {food}. The {it} smelled [so good|wonderful|sweet].
"[I will eat it all by myself|This is all for me]," {hero} thought, and {he} [went|walked] {to} to eat.
{meet}, {he} met {friend}, a [little|thin|tired|hungry] {fkind}. {friend} looked very [hungry|sad and hungry].
"[Hello|Good morning|Good day], {hero}," said {friend}. "I have not eaten [all day|since yesterday]."
{hero} looked at the {it}. {He} [was hungry, too|wanted to keep it all], but {he} felt sorry for {friend}.
"[Come and sit with me|Sit down next to me|Please stay]," said {hero}.
"[We can share|There is enough for two]."
So {he} gave half of the {it} to {friend}. [They ate and talked and laughed.|They ate until they were full.]
"[This is the best meal that I ever had|You are very kind]," said {friend}. "Thank you!"
{hero} {joy}. [The {it} tasted better than ever.|{He} did not feel hungry at all.|]
[The next day, {friend} came back with [a flower|a red apple|a little present|a song] for {hero}.|]
""",
    morals=(
        "it is good to share",
        "food tastes better when you share it with a friend",
        "a kind heart makes new friends",
    ),
)

NEW_SKILL = Plot(
    slots=("skill", "fail", "tip"),
    rows=(
        ("fly a kite", "The kite fell to the ground", "Run fast and hold the string"),
        ("ride a bike", "The bike fell over", "Look ahead and keep going"),
        ("bake bread", "The bread was black and hard", "Use less fire and more time"),
        ("climb the tall tree", "The first branch was too high", "Stand on this rock and hold on"),
        ("dance", "One foot bumped into the other", "Listen to the music and count to three"),
        ("row a boat", "The boat went around and around", "Pull with both arms at the same time"),
        ("skip stones", "Every stone sank in the water", "Pick a flat stone and throw it low"),
        ("play the drum", "It was only a loud noise", "Start slowly and listen"),
        ("paint a picture", "The colors all turned brown", "Use one color at a time"),
        ("whistle a tune", "No sound came out", "Make your mouth small and blow softly"),
    ),
    beats="""
More than anything, {hero} wanted to [learn to |]{skill}.
{day}, {he} went {to} and tried. {fail}. [{He} tried again, but it was no use.|{He} tried again and again.|]
"[I will never learn|This is too hard|I cannot do it]," said {hero}, and {he} [sat down|wanted to go home].
{meet}, {friend} the {fkind} [came by|saw {him}|heard {him}].
"[Do not give up|I can show you how]," said {friend}.
"How do you do it?" asked {hero}. "{tip}," said {friend}. "[Take your time|It is easy|I will help you]."
{hero} [took a deep breath|closed {his} eyes for a moment|nodded] and tried [again|one more time].
[It was better, but it was not right yet. They practiced [all day|until the sun went down].|At first it was hard.|]
[At last|Then|The next day], it worked! {hero} could {skill}!
"[Look at me|I can do it|I did it]!" [shouted|cried] {hero}. {friend} [clapped and cheered|was very proud].
{hero} {joy}. {thanks}
""",
    morals=(
        "you should never give up",
        "with time and help, you can learn anything",
        "it is fine to ask a friend for help",
    ),
)

RESCUE = Plot(
    slots=("trouble", "tool", "act"),
    rows=(
        ("was stuck in the mud", "a long rope", "pulled"),
        ("was up in a tall tree and could not come down", "a ladder", "climbed up"),
        ("was caught in a net", "a sharp stone", "cut the net"),
        ("was at the bottom of a deep hole", "a strong rope", "pulled"),
        ("was on a rock in the middle of the water", "a little boat", "rowed across"),
        ("was stuck behind a fallen tree", "a strong stick", "pushed the tree away"),
        ("was trapped under a heavy basket", "a long stick", "lifted the basket"),
    ),
    beats="""
{day}, {hero} was [walking|playing] {at} when {he} heard a [small|sad|strange] sound.
"Help! [Please help me|Somebody help me|I need help]!" a voice [called|cried].
{hero} ran [to look|as fast as {he} could]. It was {friend} the {fkind}! {friend} {trouble}.
"[Do not be afraid|Do not worry|Stay calm]," said {hero}. "I will [help you|get you out|save you]."
{hero} [was a little afraid, too|thought hard|looked around]. Then {he} had [an idea|a good idea].
{He} [ran home|hurried home|ran off] and came back with {tool}.
{He} {act} [with all {his} might|very carefully].
[It took a long time, but {hero} did not stop.|It was hard work.|]
[At last|Soon|In the end], {friend} was [safe|free]. "[You saved me|You are so brave]!" said {friend}.
"Thank you!"
"[I am glad that you are safe|That is what friends are for|You are welcome]," said {hero}.
{friend} {joy}, and they [went home together|walked home side by side|sat down to rest in the sun].
""",
    morals=(
        "even a small hero can do great things",
        "being brave means helping when you are afraid",
        "it is good to help others",
    ),
)

STORM = Plot(
    slots=("weather", "after"),
    rows=(
        ("the sky turned dark and it began to rain", "a big rainbow was in the sky"),
        ("a strong wind began to blow", "the air was clear and still"),
        ("thick snow began to fall", "everything was white and bright"),
        ("there was a loud clap of thunder", "the sun was shining again"),
        ("a gray fog came down", "they could see the road again"),
    ),
    beats="""
{day}, {hero} and {his} friend {friend} the {fkind} were playing {at}.
[Suddenly|All at once], {weather}. "[I am scared|I want to go home|I do not like this]," said {friend}.
{hero} was scared, too, but {he} [took {friend} by the hand|tried to be brave|stayed calm].
"[Follow me|Come with me|Stay close to me]," said {hero}. "[We will find a safe place|I know where to go]."
They ran [past the trees|along the path|up the path] until they found [a cave|an old barn|a hollow tree|a little hut].
[Inside it was dry and warm.|Inside it was dark, but it was dry.]
To feel better, they [sang a song|told each other stories|counted to one hundred|talked about their favorite things].
[Soon they were laughing, and they forgot the storm.|After some time, they were not scared anymore.]
When they came out, {after}. "[How beautiful|Look at that|It is over]!" said {friend}.
They [walked|ran|hurried] home, where {hero}'s mother gave them [hot soup|warm milk|bread and honey].
""",
    morals=(
        "every storm comes to an end",
        "you are less afraid when you are not alone",
        "a song can chase the fear away",
    ),
)

PRESENT = Plot(
    slots=("gift", "from", "broke"),
    rows=(
        ("a birthday cake", "flour and eggs", "it fell on the floor"),
        ("a paper star", "gold paper", "the paper tore"),
        ("a necklace", "little shells", "the string broke"),
        ("a small boat", "wood", "the sail tore"),
        ("a crown of flowers", "daisies and roses", "the wind blew it away"),
        ("a picture", "paper and paint", "the rain washed the colors away"),
        ("a warm scarf", "blue wool", "it fell into the mud"),
    ),
    beats="""
{hero} had a friend, {friend} the {fkind}. [Tomorrow|Soon] it was {friend}'s birthday.
"I want to make [something special|the best present in the world]," thought {hero}.
[{He} thought and thought.|] Then {he} decided to make {gift} from {from}.
{He} worked [all day|all morning|very hard|until it was dark]. [It was beautiful.|{He} was proud of it.]
But on the way to {friend}'s house, {broke}. [Oh no!|What a pity!] {hero} [began to cry|was very sad].
[There was no time to make a new one.|"Now I have nothing to give," {he} said.]
{He} knocked on the door. "[I am so sorry|I am sorry, {friend}]," said {hero}.
"I made {gift} for you, but {broke}."
{friend} [smiled|gave {him} a hug]. "[You came, and that is the best present|You are my present]," {fhe} said.
[Then they sat down and made a new one together.|Then they worked together and made a new one.]
It was even better than before, and they both [laughed|were happy].
""",
    morals=(
        "the best present is a good friend",
        "love is worth more than any gift",
        "what you make together is the best of all",
    ),
)

JOURNEY = Plot(
    slots=("dream", "sight"),
    rows=(
        ("see the sea", "The sea was big and blue, and the waves sang a soft song"),
        ("see the snow on the mountain", "The snow was as white as milk, and it was cold and soft"),
        ("find the end of the rainbow", "There was a field full of flowers in every color"),
        ("see the sun rise from the hill", "The sky turned pink and gold, and the birds began to sing"),
        ("find the old castle", "The castle had tall towers and a garden full of roses"),
        ("see the big waterfall", "The water fell down like silver, and it was loud and lovely"),
    ),
    beats="""
{hero} had a dream. {He} wanted to {dream}.
"It is too far," said [the others|{his} mother|everyone]. But {hero} did not [stop dreaming|listen].
{day}, {he} put [some bread|two apples|some cheese] in a bag and [set out|left home] with {friend} the {fkind}.
They walked [for a long time|all day|for hours] until they came to a [wide river|deep river|high wall|dark forest].
"[How can we get across|How can we go on|What do we do now]?" asked {hero}.
{friend} [thought for a while|looked around].
"[I see a way|I have an idea|I know what to do]," said {friend}. "Follow me!"
[Step by step|Slowly and carefully|Side by side], they made it to the other side.
[They were tired but happy.|]
[At night they slept under the stars.|] In the morning, they were there[ at last|].
{sight}. {hero} [could not say a word|had never seen anything so beautiful|jumped for joy].
"[We did it|We are here|It was worth it]!" said {friend}.
They stayed [until evening|all day] and then went home.
""",
    morals=(
        "a long road is short with a friend",
        "dreams come true if you keep walking",
        "every big journey begins with a small step",
    ),
)

SEED = Plot(
    slots=("seed", "grown"),
    rows=(
        ("small brown seed", "a tall yellow sunflower"),
        ("tiny black seed", "a beautiful red rose"),
        ("round seed", "a big orange pumpkin"),
        ("shiny seed", "a little apple tree"),
        ("strange seed", "a blue flower that smelled like honey"),
    ),
    beats="""
{day}, {hero} found a {seed} {at}. "[What are you|What will you be], little seed?" {he} asked.
{He} [took it home|carried it home], put it in the ground and gave it some water.
The next day, {hero} looked, but [nothing was there|there was only earth]. {He} waited and waited.
"[Nothing happens|It does not grow]," {he} said to {friend} the {fkind}.
"[I think it is a bad seed|I want to give up]."
"[Be patient|Wait a little longer|Good things take time]," said {friend}.
"[It needs sun and water|A seed must sleep first]."
So {hero} gave it water every [day|morning], and {friend} [sang to it|told it stories|helped to keep it warm].
[A week|Many days] went by. [The rain came and the sun came.|]
Then, one morning, there was a [little|tiny] green leaf! It grew and grew until it was {grown}.
"[Look|Come and see|You were right], {friend}!" [shouted|called|cried] {hero}. {hero} {joy}.
[All the neighbors came to see it.|They sat next to it all day.|It was the most beautiful thing {at}.]
""",
    morals=(
        "good things take time",
        "you must be patient and take good care of small things",
        "great things start small",
    ),
)

NEW_FRIEND = Plot(
    slots=("play", "talent"),
    rows=(
        ("hide and seek", "find the best places to hide"),
        ("ball", "throw the ball very far"),
        ("pirates", "make a ship from an old box"),
        ("catch", "run faster than the wind"),
        ("knights", "build a castle from sticks"),
    ),
    beats="""
But {hero} was [lonely|often alone]. {He} [had nobody to play with|did not have many friends].
{day}, a [new|strange] {fkind} came {to}. {Fhis} name was {friend}, and {fhe} was very [shy|quiet].
The others did not [want to play|talk] with {friend}. "[{Fhe} is different|We do not know {fhim}]," they said.
{hero} saw that {friend} was sad. {He} [walked up to {fhim}|went over to {fhim}|sat down next to {fhim}].
"[Hello|Hi], I am {hero}," {he} said. "[Do you want to|Would you like to] play {play} with me?"
{friend} looked up and smiled. "[Yes, please|I would love to|Yes]," {fhe} said [softly|with bright eyes|].
So they played {play} [all afternoon|until it was dark|together]. {friend} could {talent}!
[Soon|The next day], the others came, too. "[Can we play with you|May we join you]?" they asked.
"{sure}," said {friend}. "[The more, the better|Everyone can play]!"
{hero} {joy}. {He} was not lonely anymore.
""",
    morals=(
        "a friendly word can change everything",
        "it is good to be kind to someone new",
        "a new friend may be just around the corner",
    ),
)

SORRY = Plot(
    slots=("thing",),
    rows=(
        ("cup",),
        ("toy train",),
        ("blue vase",),
        ("red kite",),
        ("music box",),
        ("lamp",),
    ),
    beats="""
{day}, {hero} was playing in {friend}'s house. {friend} was a {fkind} who had a beautiful {thing}.
"[Please be careful|Do not run in here]," said {friend}. But {hero} [did not listen|ran around and around].
[Crash|Oh no|Bang]! The {thing} was broken. [Nobody had seen it.|{friend} was not in the room.]
{hero} [was afraid|felt very bad]. "[I could run away|I could say that it was the wind]," {he} thought.
[When {friend} came back, {fhe} asked, "Who did this?"|Then {friend} came back and saw the broken {thing}.]
{hero} [looked down|was quiet for a moment|took a deep breath]. "[It was me|I did it]," {he} said.
"I am very sorry."
{friend} was [sad|angry] [at first|for a while]. Then {fhe} said, "Thank you for telling the truth."
"[Let us fix it|I will help you fix it|Let me fix it]," said {hero}.
They got [some glue|some tools|a hammer and some wood].
They worked [together|all afternoon|until it was done], and in the end the {thing} was [almost like new|whole again].
{hero} [felt much better|was glad|felt light and happy].
"[We are still friends|I am not angry anymore]," said {friend}.
""",
    morals=(
        "it is best to tell the truth",
        "saying sorry is the first step to make things right",
        "a friend can forgive you when you are honest",
    ),
)

FOUND_THING = Plot(
    slots=("thing", "owner"),
    rows=(
        ("shiny gold ring", "the queen"),
        ("little purse full of coins", "the baker"),
        ("lost puppy", "the old farmer"),
        ("big silver key", "the king"),
        ("blue book", "the teacher"),
        ("small bird", "the gardener"),
    ),
    beats="""
{day}, {hero} went {to} and found a {thing}. "[Whose is it|Where does it come from]?" {he} [asked|wondered].
{His} friend {friend} the {fkind} looked at it.
"[You could keep it|Nobody would know if you kept it]," said {friend}.
{hero} thought about it. {He} [liked it very much|wanted to keep it], but it belonged to somebody else.
"[Somebody must be sad without it|I must find out whose it is]," said {hero}.
"[Will you come with me|Will you help me]?"
So they [went from door to door|asked everyone that they met].
"[It is not mine|I am sorry, I do not know]," said the [miller|old man].
[They were tired, but they went on.|The sun was low, and they wanted to give up.|]
At last, they met {owner}, who was [looking for something|very sad]. "[Is this yours|Did you lose this]?"
asked {hero}.
"[Yes, it is|Yes, thank you]!" said {owner}. "[I thought it was gone forever|I looked for it everywhere]."
To thank them, {owner} gave them [a big cake|two red apples|a big hug|a basket of plums].
"[You were right|I am proud of you]," said {friend}. {hero} {joy}.
""",
    morals=(
        "it is right to give back what is not yours",
        "an honest heart is worth more than gold",
        "doing the right thing makes you happy",
    ),
)

NIGHT = Plot(
    slots=("fear", "truth"),
    rows=(
        ("a big shadow on the wall", "an old coat on a chair"),
        ("two green eyes in the dark", "a kitten that wanted to come in"),
        ("a strange noise at the window", "a branch that tapped in the wind"),
        ("something white outside", "a shirt that somebody had left outside"),
        ("a noise under the bed", "a mouse with a nut"),
    ),
    beats="""
But {hero} was afraid of the dark. [Every night {he} left a small light on.|{He} did not like the night.|]
One night, {hero} [woke up|could not sleep]. There was {fear}!
{He} [hid under the blanket|did not dare to move].
"[Who is there|Is it a monster]?" {he} [whispered|asked]. Nobody answered.
{His} friend {friend} the {fkind}, who was staying for the night, woke up, too. "[What is it|What is wrong]?"
{fhe} asked.
"[I think it is a monster|Something is there]," whispered {hero}.
"[Let us look|We will look together]," said {friend}.
They took a [lamp|candle] and walked [slowly|very quietly|hand in hand] through the dark room.
And what did they see? It was only {truth}!
{hero} and {friend} looked at each other and [laughed|began to laugh].
"[There is no monster|How silly we were]!" said {hero}.
[Then they looked out at the moon and the stars.|Then they drank some warm milk.]
The night was [quiet|beautiful].
Soon they were both [fast asleep|asleep].
[In the morning|The next day], {hero} told everyone about it and was proud.
""",
    morals=(
        "most fears are small when you look at them",
        "the dark is not so bad with a friend",
        "it helps to look at what you are afraid of",
    ),
)

PLOTS = (
    LOST_THING,
    SHARED_FOOD,
    NEW_SKILL,
    RESCUE,
    JOURNEY,
    STORM,
    SEED,
    NEW_FRIEND,
    PRESENT,
    SORRY,
    FOUND_THING,
    NIGHT,
)
