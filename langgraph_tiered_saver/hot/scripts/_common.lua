-- Shared by the scripts that append to a journal or read records; the loader puts it in front of them.

-- The shard's hash holds its generation (g), its clock and, for every thread with a journal, the journal's last sequence
-- number (t:); and run leases (f:).

-- Who holds a run lease, given its field; one that has ended nobody holds, not even who held it last: somebody without
-- a lease may have written since.
local function holder_of(lease, now)
  local holder, ends = string.match(lease or '', '^(%S+) (%d+)$')
  if holder and tonumber(ends) > now then return holder end
end

-- Look at the shard before anything is written. Returns what is known of it, or nil and the refusal:
-- * this is not the generation that the caller trusts, or the server has lost it;
-- * another worker holds the thread's run lease, or the caller's lease is not known here.
local function enter(shard, thread, generation, token)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
  local known = redis.call('HMGET', shard, 'g', 'clock', 't:' .. thread, 'f:' .. thread, 'sr')
  if known[1] ~= generation then
    return nil, redis.error_reply('TIEREDGENERATION the generation here is ' .. (known[1] or 'unknown'))
  end
  local holder = holder_of(known[4], now)
  if holder ~= token then
    if holder then return nil, redis.error_reply('TIEREDSTALE another run holds the lease') end
    return nil, redis.error_reply('TIEREDLEASE the lease is not known here')
  end
  return {now = now, last = tonumber(known[2] or '0'), tail = known[3], seen = known[5]}
end

-- Append a record; the entry's id is its sequence number. Returns {sequence number, the previous record's}, the
-- latter '0' if the journal was empty. A writer may flush from memory only while it knows every previous one.
--
-- The clock is a hybrid one: microseconds of Redis' time, unless that stands still or went back. 2^53 microseconds end
-- in the year 2255, so a double holds them exactly.
local function append(journal, shard, dirty, thread, payload, state)
  local now = state.now
  if now <= state.last then now = state.last + 1 end
  local sequence = string.format('%.0f', now)
  redis.call('HSET', shard, 'clock', sequence, 't:' .. thread, sequence)
  redis.call('XADD', journal, sequence .. '-0', 'r', payload)
  if not state.tail then redis.call('ZADD', dirty, 'NX', sequence, thread) end
  return {sequence, state.tail or '0'}
end

-- Forget what a hash holds of an older generation, which may be anything. It is emptied instead of deleted, because a
-- key that is deleted cannot be made again by the same script while its slot moves to another server.
local function renew(hot, generation, known)
  if not known then return end
  redis.call('HSET', hot, 'g', generation)
  local names = redis.call('HKEYS', hot)
  for first = 1, #names, 1000 do
    local stale = {}
    for i = first, math.min(first + 999, #names) do
      if names[i] ~= 'g' then stale[#stale + 1] = names[i] end
    end
    if #stale > 0 then redis.call('HDEL', hot, unpack(stale)) end
  end
end

-- Gives the thread that a journal's key names; neither a prefix nor a shard has a colon.
local function thread_of(journal)
  return string.sub(journal, string.find(journal, ':journal:', 1, true) + 9)
end

-- An argument that may be absent.
local function given(argument)
  if argument ~= '' then return argument end
end

-- Put off the expiry of hot state. The set of namespaces, which a delete finds the hashes by, outlives them all
-- because it is put off with each; where Redis may evict what has a TTL, it has none. Doing it ten times in a lifetime is
-- enough; `renewed` says when it was done.
local function keep_alive(hot, namespaces, ttl, namespaces_ttl, sequence, renewed)
  if namespaces_ttl == '=' then namespaces_ttl = ttl end
  if renewed and (ttl == '0' or tonumber(sequence) - tonumber(renewed) <= tonumber(ttl) * 100) then return end
  redis.call('HSET', hot, 'e', sequence)
  -- A lease may have left a short expiry behind.
  if ttl ~= '0' then redis.call('PEXPIRE', hot, ttl) else redis.call('PERSIST', hot) end
  if namespaces_ttl ~= '0' then redis.call('PEXPIRE', namespaces, namespaces_ttl) else redis.call('PERSIST', namespaces) end
end

-- Names the shard's field that says up to which checkpoint writes came while nothing was hot.
local function early_mark(thread, ns)
  return 'u:' .. #thread .. ':' .. thread .. ns
end

-- Split a run of byte strings with their lengths in front.
local function unframe(bytes)
  local parts, count, at, length = {}, 0, 1, #bytes
  while at <= length do
    count = count + 1
    parts[count], at = struct.unpack('>I4c0', bytes, at)
  end
  return parts
end

-- Read any number of fields.
local function hmget(key, names)
  if #names == 0 then return {} end
  if #names <= 1000 then return redis.call('HMGET', key, unpack(names)) end
  local values = {}
  for first = 1, #names, 1000 do
    local last = math.min(first + 999, #names)
    local found = redis.call('HMGET', key, unpack(names, first, last))
    for i = first, last do values[i] = found[i - first + 1] end
  end
  return values
end

-- Call a command with more arguments than Lua's stack takes; pairs stay together.
local function in_chunks(command, key, arguments)
  for first = 1, #arguments, 1000 do
    redis.call(command, key, unpack(arguments, first, math.min(first + 999, #arguments)))
  end
end
