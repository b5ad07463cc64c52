-- Shared by the scripts that append to a journal or read records; the loader puts it in front of them.

-- The next sequence number of the shard: a hybrid clock, microseconds of Redis' time unless that stands still or
-- went back. 2^53 microseconds end in the year 2255, so a double holds it exactly.
local function tick(clock)
  local time = redis.call('TIME')
  local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
  local last = tonumber(redis.call('GET', clock) or '0')
  if now <= last then now = last + 1 end
  local text = string.format('%.0f', now)
  redis.call('SET', clock, text)
  return text
end

-- Append a record; the entry's id is its sequence number. Returns {sequence number, the previous record's}, the
-- latter '0' if the journal was empty. A writer may flush from memory only while it knows every previous one.
local function append(journal, dirty, clock, tails, thread, payload)
  local sequence = tick(clock)
  local previous = redis.call('XLEN', journal) > 0 and redis.call('HGET', tails, thread) or '0'
  redis.call('XADD', journal, sequence .. '-0', 'r', payload)
  redis.call('HSET', tails, thread, sequence)
  redis.call('ZADD', dirty, 'NX', sequence, thread)
  return {sequence, previous}
end

-- Split a run of byte strings with their lengths in front.
local function unframe(bytes)
  local parts, at = {}, 1
  while at <= #bytes do
    parts[#parts + 1], at = struct.unpack('>I4c0', bytes, at)
  end
  return parts
end
