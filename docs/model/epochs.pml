/* The epochs of a line (tunnel/rekey/epochs.go), for Spin 6.5.

   A starts every handshake, B answers. Records are lost, and overtake each
   other at will; M3 and M4 are lost, repeated and late; A gives a handshake
   up. Checked:

     a record that arrives can be opened (undecryptable);
     an end never holds more than two receive epochs (three);
     when nothing can happen any more, all handshakes are done and both ends
     send and receive in the same epoch, with no older one left (stuck).

   What stands for time: an old epoch goes when the peer was heard on the new
   one and none of its records is under way any more (the overlap is longer
   than records are late); B forgets an M1 before A gives up (pendingLife is
   choiceLife, and starts earlier).

   Refuted variants, each by -D:
     RETIRE_AT_INSTALL  the old epoch goes when the new one comes
     SEND_AT_INSTALL    B sends in the new epoch before A was heard on it
     NEVER_BUSY         B takes an M3 while it still holds an old epoch
     NO_CONFIRM         A sends nothing of its own accord in a new epoch
     REACH              nothing is broken: the last handshake is said never
                        to end well, so that a trail shows that it does     */

#define H 3		/* handshakes A may begin; any() and lost() count to it */
#define D 1		/* records each end sends in an epoch beyond confirmation */

byte losses = 2, repeats = 1, giveups = 1;

/* Index: the handshake, and the epoch that comes of it; 0 = none. */
byte m3[H + 1], m4[H + 1], busy[H + 1];	/* copies under way */
bit pending[H + 1];			/* B has answered M1 and waits for M3 */
byte reply[H + 1];			/* what B answers a repeated M3: 1 M4, 2 busy */
byte said[H + 1];			/* what A sent in when it wrote M1 */
byte toA[H + 1], toB[H + 1];		/* records under way */
byte sentA[H + 1], sentB[H + 1];

byte begun, try;			/* A's handshakes; the one under way */
byte curA, oldA, curB, oldB, nextB;
bit heardA, heardB;			/* the peer was heard on cur */

#define receiveA ((curA != 0) + (oldA != 0))
#define receiveB ((curB != 0) + (oldB != 0) + (nextB != 0))

#define any(e, set) \
	if \
	:: set[1] > 0 -> e = 1 \
	:: set[2] > 0 -> e = 2 \
	:: set[3] > 0 -> e = 3 \
	fi
#define lost(set) (losses > 0 && set[1] + set[2] + set[3] > 0)

inline takeOverB() {
#ifndef RETIRE_AT_INSTALL
	oldB = curB;
#endif
	curB = nextB; nextB = 0; heardB = 1
}

inline learnB(e) {
	if
	:: nextB != 0 && said[e] == nextB -> takeOverB()
	:: nextB != 0 && said[e] != nextB -> nextB = 0
	:: else
	fi;
	if
	:: said[e] == 0 -> oldB = 0
	:: else
	fi
}

inline installB(e) {
	nextB = e; reply[e] = 1; m4[e]++;
	assert(receiveB <= 2);	/* three */
#ifdef SEND_AT_INSTALL
	takeOverB()
#endif
}

active proctype A() {
	byte e;
end:	do
	:: atomic { try == 0 && begun < H && oldA == 0 ->
		begun++; try = begun; pending[try] = 1; said[try] = curA; m3[try] = 1 }
	:: atomic { try != 0 && m3[try] == 0 && m4[try] == 0 && busy[try] == 0 -> m3[try] = 1 }
	:: atomic { try != 0 && repeats > 0 && m3[try] == 1 -> repeats--; m3[try]++ }
	:: atomic { try != 0 && giveups > 0 -> giveups--; pending[try] = 0; try = 0 }
	:: atomic { any(e, m4); m4[e]--;
		if
		:: e == try ->
#ifndef RETIRE_AT_INSTALL
			oldA = curA;
#endif
			curA = e; try = 0; heardA = 0;
			assert(receiveA <= 2);	/* three */
#ifdef REACH
			assert(e != H);
#endif
		:: else
		fi; e = 0 }
	:: atomic { any(e, busy); busy[e]--;
		if
		:: e == try -> try = 0
		:: else
		fi; e = 0 }
	:: atomic { curA != 0 && sentA[curA] < D -> sentA[curA]++; toB[curA]++ }
#ifndef NO_CONFIRM
	:: atomic { curA != 0 && curB != curA && toB[curA] == 0 -> toB[curA]++ }
#endif
	:: atomic { any(e, toA); toA[e]--;
		assert(e == curA || e == oldA);	/* undecryptable */
		if
		:: e == curA -> heardA = 1
		:: else
		fi; e = 0 }
	:: atomic { oldA != 0 && heardA && toA[oldA] == 0 -> oldA = 0 }
	od
}

active proctype B() {
	byte e;
end:	do
	:: atomic { any(e, m3); m3[e]--;
		if
		:: pending[e] -> pending[e] = 0; learnB(e);
			if
#ifndef NEVER_BUSY
			:: oldB != 0 -> reply[e] = 2; busy[e]++
#endif
			:: else -> installB(e)
			fi
		:: !pending[e] && reply[e] == 1 -> m4[e]++
		:: !pending[e] && reply[e] == 2 -> busy[e]++
		:: else
		fi; e = 0 }
	:: atomic { curB != 0 && sentB[curB] < D -> sentB[curB]++; toA[curB]++ }
	:: atomic { curB != 0 && curA == curB && !heardA && toA[curB] == 0 -> toA[curB]++ }
	:: atomic { any(e, toB); toB[e]--;
		assert(e == curB || e == oldB || e == nextB);	/* undecryptable */
		if
		:: e == nextB -> takeOverB()
		:: e == curB && e != nextB -> heardB = 1
		:: else
		fi; e = 0 }
	:: atomic { oldB != 0 && heardB && toB[oldB] == 0 -> oldB = 0 }
	od
}

active proctype Network() {
	byte e;
end:	do
	:: atomic { lost(m3) -> any(e, m3); m3[e]--; losses--; e = 0 }
	:: atomic { lost(m4) -> any(e, m4); m4[e]--; losses--; e = 0 }
	:: atomic { lost(toA) -> any(e, toA); toA[e]--; losses--; e = 0 }
	:: atomic { lost(toB) -> any(e, toB); toB[e]--; losses--; e = 0 }
	:: atomic { timeout ->
		assert(begun == H && try == 0 && oldA == 0 && oldB == 0 &&
			curA == curB && (curA == 0 || heardA));	/* stuck */
		break }
	od
}
